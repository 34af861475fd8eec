"""Networks of the user's own: both paths against plain loops, refusals, names, draws, and a whole run."""

import hashlib
import json
import logging
import random
import sys
import textwrap

import numpy as np
import oracles
import pytest
import runs
import torch
import torch.nn.functional as F
from oracles import ROUNDING, assert_close, distance, meta_batch, normal
from torch import Tensor, nn
from torch.func import functional_call

from metalearn.algorithms import MAML, ProtoNet
from metalearn.backbones import Module, chain, module, plain
from metalearn.cells import expand
from metalearn.episode import Episode
from metalearn.identity import contents_of
from metalearn.meta_gradient import meta_gradient
from metalearn.random import Key
from metalearn.run import run
from metalearn.schema import BadInput

SHAPE = (2, 6, 6)


# ---- factories -----------------------------------------------------------------------------------------------------


def block(inputs, outputs, *, stride=False, bn=True, relu=True):
    layers = [nn.Conv2d(inputs, outputs, 3, stride=2 if stride else 1, padding=1)]
    layers += [nn.BatchNorm2d(outputs)] if bn else []
    layers += [nn.ReLU(inplace=True)] if relu else []
    return nn.Sequential(*layers, *([] if stride else [nn.MaxPool2d(2)]))


def conv_net(*, input_shape, outputs, stride=False, bn=True):
    """What `oracles.conv_net` computes, nested."""
    side = 2 if stride else 1
    body = nn.Sequential(block(input_shape[0], 3, stride=stride, bn=bn), block(3, 3, stride=stride, bn=bn))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(3 * side * side, outputs))


def odd_net(*, input_shape, outputs):
    """Everything else that is covered, without batch norm (which the plain path does not have)."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(input_shape[0], 4, 2, stride=2, bias=False),
        nn.Conv2d(4, 3, 1),
        nn.Tanh(),
        nn.Identity(),
        nn.Conv2d(3, 5, 3, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(5, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, outputs),
        nn.Tanh(),
    )


def flat(*, input_shape, outputs):
    """Fits any data set."""
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(input_shape).numel(), outputs))


class Residual(nn.Module):
    """LayerNorm, GELU, a residual connection, a buffer, a tied weight, a bare parameter."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stages = nn.Linear(inputs, 6)  # named as an attribute of our class
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.again = self.up
        self.scale = nn.Parameter(torch.rand(6))
        self.register_buffer("shift", torch.linspace(-1, 1, 6))
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(x.flatten(1)) + self.shift
        h = h + self.scale * self.down(F.gelu(self.up(self.norm(h))))
        h = h + self.down(torch.tanh(self.again(h)))
        return self.head(h)


def residual(*, input_shape, outputs, **_):
    return Residual(torch.Size(input_shape).numel(), outputs)


def smooth(*, input_shape, outputs, width=4):
    return nn.Sequential(nn.Linear(input_shape[0], width), nn.Tanh(), nn.Linear(width, outputs))


def gelu(*, input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.GELU(), nn.Linear(5, outputs or 4))


class Recurrent(nn.Module):
    """Has no batching rule."""

    def __init__(self, outputs: int):
        super().__init__()
        self.gru, self.out = nn.GRU(6, 4, batch_first=True), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:  # control flow by values
            return self.out(x[:, 0, 0, :4])
        return self.out(self.gru(x[:, 0])[1][0])


def recurrent(*, input_shape, outputs):
    return Recurrent(outputs)


def draws_from_all(*, input_shape, outputs):
    net = nn.Sequential(nn.Linear(input_shape[0], outputs), nn.GELU(), nn.Linear(outputs, outputs))
    with torch.no_grad():
        net[0].weight += float(np.random.rand()) + random.random()  # noqa: NPY002
    return net


def make(factory, outputs=3, shape=SHAPE, **rest) -> Module:
    return Module(input_shape=shape, outputs=outputs, factory=f"{__name__}:{factory.__name__}", **rest)


def learner_of(net, kind="classification", **options) -> MAML:
    options = {"alpha": 0.3, "inner_steps": 2, "test_steps": 2} | options
    return oracles.build(MAML, net, kind, **options)


# ---- values and gradients ------------------------------------------------------------------------------------------


def plain_maml(learner: MAML, user: nn.Module, episodes: Episode) -> tuple[Tensor, list[Tensor]]:
    """Query losses and outer gradient: the user's own module, one task after the other, by autograd alone."""
    theta = {k: p.detach().clone().requires_grad_() for k, p in user.named_parameters()}
    moving, losses = [k for k in theta if k.startswith(learner.adapted)], []
    for i in range(episodes.tasks):
        phi = dict(theta)
        for _ in range(learner.inner_steps):
            value = oracles.loss(functional_call(user, phi, (episodes.support.x[i],)), episodes.support.y[i])
            grads = torch.autograd.grad(
                value, [phi[k] for k in moving], create_graph=not learner.first_order, materialize_grads=True
            )
            phi |= {k: phi[k] - learner.alpha * g for k, g in zip(moving, grads, strict=True)}
        losses.append(oracles.loss(functional_call(user, phi, (episodes.query.x[i],)), episodes.query.y[i]))
    value = torch.stack(losses)
    return value.detach(), list(torch.autograd.grad(value.mean(), list(theta.values()), materialize_grads=True))


def user_module(net: Module) -> nn.Module:
    """A fresh module of the user's with the learner's parameters."""
    user = net.make(1).double()
    user.load_state_dict(net.state_dict())
    return user


def assert_like_the_loop(learner: MAML, episodes: Episode) -> None:
    losses, grads = plain_maml(learner, user_module(learner.net), episodes)
    result = meta_gradient(learner, meta_batch(episodes))
    assert_close(result.loss, losses)
    assert distance(result.grads, grads) < ROUNDING


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("stride", [False, True])
@pytest.mark.parametrize("bn", [False, True])
def test_a_covered_chain_is_conv4(stride, bn, first_order):
    """With the same parameters: predictions under every mode, losses, and outer gradients."""
    ours = make(conv_net, arguments={"stride": stride, "bn": bn})
    theirs = oracles.conv_net(downsample="stride" if stride else "maxpool", bn=bn)
    assert ours.sites == theirs.sites and ours.has_norm == bn
    one, other = learner_of(ours, first_order=first_order), learner_of(theirs, first_order=first_order)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    episodes = oracles.pictures()
    results = [meta_gradient(learner, meta_batch(episodes)) for learner in (one, other)]
    assert_close(results[0].loss, results[1].loss)
    assert distance(results[0].grads, results[1].grads) < ROUNDING
    assert results[0].seen.keys() == results[1].seen.keys()
    modes = ["batch", "support_plus_one", "support_only", "running"] if bn else ["none"]
    for learner, result in zip((one, other), results, strict=True):
        learner.running.absorb(result.seen)
    scores = [learner.evaluate(meta_batch(episodes), {m: [0, -1] for m in modes}) for learner in (one, other)]
    assert_close(scores[0], scores[1])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("factory", [conv_net, odd_net, gelu, residual, recurrent])
@pytest.mark.parametrize("adapted", ["", "last"])
def test_outer_gradient_is_that_of_a_loop_over_tasks(factory, first_order, adapted):
    """By ordinary differentiation of the user's module (batch statistics: a module in training mode)."""
    net = make(factory)
    adapted = adapted and next(reversed(dict(net.named_parameters()))).split(".")[0]
    assert_like_the_loop(learner_of(net, first_order=first_order, adapted=adapted), oracles.pictures())


@pytest.mark.parametrize("factory", [odd_net, smooth])
def test_the_plain_path_is_the_fast_path(factory, monkeypatch):
    flat = factory is smooth
    episodes = oracles.curves() if flat else oracles.pictures()
    kind, given = ("regression", {"outputs": 1, "shape": (2,)}) if flat else ("classification", {})
    fast = learner_of(make(factory, **given), kind)

    def nothing(*_):
        raise chain.Uncovered("a test")

    monkeypatch.setattr(module, "chain", nothing)
    slow = learner_of(make(factory, **given), kind)
    assert slow.net.stages == ["head"] and len(fast.net.stages) > 1
    results = [meta_gradient(learner, meta_batch(episodes)) for learner in (fast, slow)]
    assert_close(results[0].loss, results[1].loss)
    assert distance(results[0].grads, results[1].grads) < ROUNDING


def test_parameters_may_be_shared_or_one_per_task_leaf_by_leaf():
    net, x = make(residual).double(), normal(4, 3, *SHAPE, seed=0)
    user = user_module(net)
    own = {k: normal(4, *s, seed=i) for i, (k, s) in enumerate(net.shapes().items())}
    for which in ([], ["norm.weight", "scale"], list(own)):
        params = {k: own[k] if k in which else p for k, p in net.named_parameters()}
        tasks = [{k: p[i] if k in which else p for k, p in params.items()} for i in range(4)]
        expected = torch.stack([functional_call(user, t, (z,)) for t, z in zip(tasks, x, strict=True)])
        assert_close(net.run(params, x), expected)


def repeated(*, input_shape, outputs):
    act = nn.ReLU()
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), act, nn.Linear(5, 5), act, nn.Linear(5, outputs))


def shared(*, input_shape, outputs):
    layer = nn.Linear(72, 72)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(72, outputs))


@pytest.mark.parametrize("factory", [repeated, shared])
def test_layers_that_come_twice(factory):
    net = make(factory)
    assert (net.stages == ["head"]) == (factory is shared)
    assert_like_the_loop(learner_of(net), oracles.pictures())


def test_threads_do_not_share_a_module():
    """Chunks of tasks on threads: the same numbers as one after the other."""
    net = make(residual)
    learner = learner_of(net, chunk_bytes=1)
    episodes = oracles.pictures(8)
    alone = meta_gradient(learner, meta_batch(episodes))
    torch.set_num_threads(4)
    together = meta_gradient(learner, meta_batch(episodes))
    assert torch.equal(alone.loss, together.loss)
    assert all(torch.equal(a, b) for a, b in zip(alone.grads, together.grads, strict=True))


def test_features_for_prototypes():
    """Without outputs the sites end with `feat`."""
    net = make(gelu, 0)
    assert net.sites == ["input", "feat"]
    learner = oracles.build(ProtoNet, net, "classification")
    assert meta_gradient(learner, meta_batch(oracles.pictures())).finite
    assert make(embedding, 0, (2,)).sites == ["input", "block1", "feat"]


def embedding(*, input_shape, outputs):
    assert outputs == 0
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))


def test_features_below_moving_parameters_are_computed_once():
    net = make(conv_net)
    assert net.first_site(["2.weight"]) == "feat"
    assert net.first_site(["0.1.1.bias", "2.weight"]) == "block1"
    assert net.first_site(["0.0.0.weight"]) == "input"
    assert make(residual).first_site(["head.bias"]) == "input"


# ---- names and draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [conv_net, residual])
def test_the_state_dict_is_the_users(factory):
    net = make(factory)
    user = net.make(5)
    assert net.state_dict().keys() == user.state_dict().keys()
    assert net.shapes().keys() == dict(user.named_parameters()).keys()
    net.load_state_dict(user.state_dict())
    runs.assert_same_bits(dict(net.state_dict()), dict(user.state_dict()))
    assert {p.dtype for p in net.double().user[0].parameters()} == {torch.float64}


@pytest.mark.parametrize("init", ["keep", "xavier"])
@pytest.mark.parametrize("factory", [conv_net, residual, draws_from_all])
def test_initial_parameters_depend_on_the_seed_alone(factory, init):
    """Whatever ran before; and no global generator notices."""

    def draw(seed):
        net = make(factory, 3, (72,) if factory is draws_from_all else SHAPE, init=init)
        net.reset(Key(seed, "init"))
        return dict(net.state_dict())

    before = plain.generators()
    first = draw(0)
    assert plain.generators() == before
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    runs.assert_same_bits(first, draw(0))
    other = draw(1)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_xavier_draws_what_it_knows():
    net = make(residual, init="xavier")
    net.reset(Key(3, "init"))
    assert torch.equal(net.norm.weight, torch.ones(6)) and not net.up.bias.any()
    bound = (6 / (6 + 5)) ** 0.5
    assert 0.5 * bound < float(net.up.weight.detach().abs().max()) <= bound
    assert (
        net.scale.min() >= 0 and net.scale.unique().numel() == 6
    )  # its owner is no known layer: as the factory drew it


# ---- what is said --------------------------------------------------------------------------------------------------


def unpooled(*, input_shape, outputs):
    return nn.Sequential(nn.Conv2d(2, 3, 3, groups=1, dilation=2), nn.Flatten(), nn.Linear(12, outputs))


@pytest.mark.parametrize(
    ("factory", "level", "parts"),
    [
        (conv_net, "INFO", ["fast path"]),
        (gelu, "WARNING", ["plain path, because layer '2' (GELU(", "not covered (several times slower)"]),
        (residual, "WARNING", ["plain path, because a Residual as a whole is not covered"]),
        (unpooled, "WARNING", ["plain path, because layer '0' (Conv2d(2, 3", "dilation=(2, 2)"]),
        (recurrent, "WARNING", ["one task after the other", "plain path"]),
    ],
)
def test_the_path_and_its_reason_are_logged_once(factory, level, parts, caplog):
    caplog.set_level(logging.INFO)
    net = make(factory)
    net.reset(Key(0, "init"))
    (record,) = caplog.records
    assert record.levelname == level
    for part in (f"backbone.factory={__name__}:{factory.__name__}:", *parts):
        assert part in record.getMessage()


def slow_averages(*, input_shape, outputs):
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.01), nn.Flatten(), nn.Linear(48, outputs))


def test_running_averages_are_the_learners(caplog):
    make(slow_averages)
    assert "running averages of batch norm have momentum 0.1" in caplog.text


class Peculiar(nn.Module):
    def __init__(self, forward, **buffers):
        super().__init__()
        self.w, self.does = nn.Parameter(torch.ones(72, 3)), forward
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.does(self, x)


def no_module(*, input_shape, outputs):
    return "net"


def no_arguments():
    return nn.Linear(1, 1)


def wrong_outputs(*, input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(72, outputs + 1))


def wrong_inputs(*, input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(71, outputs))


def wrong_head(*, input_shape, outputs):
    return nn.Sequential(block(2, 3), nn.Flatten(), nn.Linear(12, outputs))


def too_deep(*, input_shape, outputs):
    return nn.Sequential(block(2, 3), block(3, 3), block(3, 3), nn.Flatten(), nn.Linear(3, outputs))


def batch_norm_deep(*, input_shape, outputs):
    return nn.Sequential(block(2, 3), nn.GELU(), nn.Flatten(), nn.Linear(27, outputs))


def summed(*, input_shape, outputs):
    return Peculiar(lambda m, x: (x.flatten(1) @ m.w).sum())


def detached(*, input_shape, outputs):
    return Peculiar(lambda m, x: (x.flatten(1) @ m.w).detach())


def batch_norm(*, input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4), nn.Linear(4, outputs))


def dropout(*, input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, outputs))


def noise(*, input_shape, outputs):
    return Peculiar(lambda m, x: (x + torch.randn(x.shape)).flatten(1) @ m.w)


def in_place(*, input_shape, outputs):
    return Peculiar(lambda m, x: x.mul_(2).flatten(1) @ m.w)


def counting(*, input_shape, outputs):
    return Peculiar(lambda m, x: x.flatten(1) @ (m.w + 0 * m.count.add_(1)), count=torch.zeros(()))


def mixing(*, input_shape, outputs):
    return Peculiar(lambda m, x: (x - x.mean(0)).flatten(1) @ m.w)


def tuples(*, input_shape, outputs):
    return Peculiar(lambda m, x: (x.flatten(1) @ m.w, x))


def frozen(*, input_shape, outputs):
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, outputs))
    net[1].bias.requires_grad_(False)
    return net


def lazy(*, input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(outputs))


def empty(*, input_shape, outputs):
    return nn.Flatten()


def failing(*, input_shape, outputs):
    raise RuntimeError("of the user's own")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (no_module, "must return an nn.Module, and returns str"),
        (no_arguments, r"called with input_shape=\(2, 6, 6\), outputs=3 it raised TypeError: .*unexpected keyword"),
        (failing, r"RuntimeError: of the user's own \(.*test_module.py:\d+\)"),
        (wrong_outputs, r"must map \[n, 2, 6, 6\] to \[n, 3\], and gives \[n, 4\]"),
        (wrong_inputs, r"a forward pass of \[3, 2, 6, 6\] raised RuntimeError: mat1 and mat2"),
        (wrong_head, r"a forward pass of \[3, 2, 6, 6\] raised RuntimeError: mat1 and mat2"),
        (too_deep, r"a forward pass of \[3, 2, 6, 6\] raised RuntimeError"),
        (batch_norm, r"batch norm \(layer '2'\) .*alone, and layer '2' \(BatchNorm1d\(.* is not covered"),
        (batch_norm_deep, r"batch norm \(layer '0.1'\) .*alone, and layer '1' \(GELU\(.* is not covered"),
        (dropout, r"no random numbers .*leave out layer '1' \(Dropout\(p=0.5"),
        (noise, "no random numbers"),
        (in_place, "must not change its input in place"),
        (counting, "changes its buffer 'count'"),
        (mixing, "independently of the others"),
        (tuples, "to a tensor, and gives tuple"),
        (summed, r"to \[3, ...\], and gives \[\]"),
        (detached, "depend differentiably on its parameters"),
        (frozen, "'1.bias' needs no gradient"),
        (lazy, "'1.weight' is lazy"),
        (empty, "must have parameters to learn, and Flatten has none"),
    ],
)
def test_modules_that_cannot_be_used_are_refused(factory, message):
    with pytest.raises(BadInput, match=message) as refusal:
        make(factory)
    text = str(refusal.value)
    assert text.startswith(f"backbone.factory={__name__}:{factory.__name__}: ") and text.count("\n") < 3


def test_a_prefix_that_begins_no_parameter_is_refused():
    learner = learner_of(make(gelu), adapted="head")
    with pytest.raises(BadInput, match="algorithm.adapted: begins no parameter of .*; their names begin 1, 3"):
        meta_gradient(learner, meta_batch(oracles.pictures()))


# ---- commands ------------------------------------------------------------------------------------------------------

SOURCE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(1, width), nn.LayerNorm(width), nn.Linear(width, 1)

        def forward(self, x):
            return self.head(torch.sin(self.norm(self.first(x))))

    def make_net(*, input_shape, outputs, width=8):
        return Net(width)

    def make_chain(*, input_shape, outputs):
        return nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, outputs))

    def make_string(*, input_shape, outputs):
        return "net"

    number = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's package in the working directory, which cannot be imported while NO is set."""
    folder = tmp_path / "work" / "my_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import os\nassert 'NO' not in os.environ, 'imported'\n")
    (folder / "nets.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


USER = ("backbone=module", "backbone.factory=my_package.nets:make_net")


def cell(*arguments):
    (found,) = expand([*runs.TINY, *arguments])
    return found


def test_the_source_file_enters_the_identity_without_being_imported(package, monkeypatch):
    monkeypatch.setenv("NO", "1")
    before = cell(*USER)
    assert "my_package" not in sys.modules
    assert cell(*USER).cell_id == before.cell_id
    assert cell(*USER, "backbone.arguments.width=9").train_id != before.train_id
    (package / "other.py").write_text("x = 1")
    assert cell(*USER).cell_id == before.cell_id
    with open(package / "nets.py", "a") as file:
        file.write("# changed\n")
    after = cell(*USER)
    assert after.train_id != before.train_id
    digest = hashlib.sha256((package / "nets.py").read_bytes()).hexdigest()
    assert contents_of(after.config) == {"backbone.content": f"{digest}:make_net"}


def test_arguments_are_a_mapping_of_the_users(package):
    given = [
        cell(*USER, a).config["backbone"]["arguments"]
        for a in ("backbone.arguments={width: 4}", "backbone.arguments.width=4")
    ]
    assert given == [{"width": 4}, {"width": 4}]
    cells = expand([*runs.TINY, *USER, "backbone.arguments.width=4,8"])
    assert [c.config["backbone"]["arguments"] for c in cells] == [{"width": 4}, {"width": 8}]
    with pytest.raises(BadInput, match=r"backbone.arguments=4: must be a mapping"):
        cell(*USER, "backbone.arguments=4")
    with pytest.raises(BadInput, match=r"backbone.arguments.outputs=4: the data set says so"):
        cell(*USER, "backbone.arguments.outputs=4")
    with pytest.raises(BadInput, match=r"backbone.argument.width: no such key"):
        cell(*USER, "backbone.argument.width=4")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_package.nets", "must be module:function, as my_package.nets:make_net"),
        ("my_package.nets.make_net:", "must be module:function"),
        ("my_packag.nets:make_net", "no module 'my_packag'; did you mean 'my_package'?"),
        ("my_package.net:make_net", "no module 'my_package.net'; did you mean 'nets'?"),
        ("sys:exit", "module 'sys' has no file"),
    ],
)
def test_factories_that_are_not_there_are_refused_before_torch(package, factory, message):
    with pytest.raises(BadInput, match="^backbone.factory=") as refusal:
        cell("backbone=module", f"backbone.factory={factory}")
    assert message in str(refusal.value)


def test_a_factory_is_required():
    with pytest.raises(BadInput, match="backbone.factory is required"):
        cell("backbone=module")


@pytest.mark.slow
def test_a_run_of_a_users_module(package, tmp_path):
    """From the command line, on the plain path."""
    steps = ("trainer.max_steps=3", "trainer.val_every=0", "algorithm=anil")
    ended = runs.console(tmp_path, *steps, *USER, "backbone.arguments.width=6", cwd=package.parent)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout + ended.stderr
    assert said.count("plain path, because a Net as a whole is not covered") == 1
    (found,) = (tmp_path / "runs").glob("*/result.json")
    result = json.loads(found.read_text())
    assert result["config"]["backbone"]["arguments"] == {"width": 6} and result["metrics"]["mse"]["n"] == 9


@pytest.mark.slow
def test_a_refused_module_ends_with_exit_code_2(package, tmp_path):
    given = "backbone.factory=my_package.nets:make_string"
    ended = runs.console(tmp_path, "backbone=module", given, cwd=package.parent)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"metalearn: {given}: must return an nn.Module, and returns str" in ended.stderr


def test_runs_in_this_process(package, tmp_path):
    """The same seed ends with the same bits, on both paths; a prefix that begins no parameter is refused."""
    steps = ("trainer.max_steps=3", "trainer.val_every=2", "backbone=module")
    for name in ("make_net", "make_chain"):
        given = (*steps, f"backbone.factory=my_package.nets:{name}")
        twins = [runs.cell_of(tmp_path / side, *given) for side in ("one", "other")]
        assert [run(twin) for twin in twins] == ["done", "done"]
        runs.assert_twins(tmp_path / "one", tmp_path / "other", twins[0])
    with pytest.raises(BadInput, match="algorithm.adapted: begins no parameter"):
        run(runs.cell_of(tmp_path, *given, "algorithm=anil"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_nett", "no 'make_nett' in my_package.nets; did you mean 'make_net'?"),
        ("number", "must be callable, and number is of type int"),
    ],
)
def test_factories_that_are_no_functions_are_refused(package, function, message):
    factory = f"my_package.nets:{function}"
    with pytest.raises(BadInput) as refusal:
        Module(input_shape=(1,), outputs=1, factory=factory)
    assert str(refusal.value) == f"backbone.factory={factory}: {message}"


def test_a_file_that_cannot_be_imported_is_refused(package):
    (package / "nets.py").write_text("import torch\nno_such_name\n")
    with pytest.raises(BadInput, match=r"importing my_package.nets failed: NameError: .*nets.py:2\)"):
        Module(input_shape=(1,), outputs=1, factory="my_package.nets:make_net")
