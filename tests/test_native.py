"""The compiled kernels against PyTorch's operators: the same function with the same derivatives."""

import oracles
import pytest
import torch
from oracles import ROUNDING, distance, normal
from torch import Tensor

from metalearn.algorithms import MAML
from metalearn.ops import Normalization, native, norm_relu_pool, stem
from metalearn.ops.conv import conv2d
from metalearn.ops.layout import empty
from metalearn.ops.norm import Moments

LIKE = torch.zeros(1, dtype=torch.float64)


@pytest.fixture(autouse=True)
def compiled():
    if native.library(LIKE) is None:
        pytest.skip(f"no kernels here: {native.reason()}")


def derivatives(function, leaves: list[Tensor], order: int) -> list[list[Tensor]]:
    """The value and `order` derivatives, each in every leaf, contracted with fixed random tensors."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    values = [function(*leaves)]
    found = [[values[0].detach()]]
    for i in range(order):
        total = sum((v * normal(*v.shape, seed=50 + 10 * i + j)).sum() for j, v in enumerate(values))
        values = list(torch.autograd.grad(total, leaves, create_graph=i + 1 < order, materialize_grads=True))
        found.append([v.detach() for v in values])
    return found


def agree(function, leaves: list[Tensor], monkeypatch: pytest.MonkeyPatch, order: int = 3) -> None:
    compiled = derivatives(function, leaves, order)
    monkeypatch.setattr(native, "enabled", False)
    assert native.library(LIKE) is None
    for degree, (a, b) in enumerate(zip(compiled, derivatives(function, leaves, order), strict=True)):
        assert distance(a, b) < ROUNDING * 10**degree, degree


def gammas(tasks: int, channels: int) -> Tensor:
    """Scales of both signs, and zeros."""
    gamma = normal(tasks, channels, seed=3)
    gamma[:, ::5] = 0
    return gamma


@pytest.mark.parametrize("outermost", [False, True], ids=["beside", "outermost"])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize(
    "tasks,channels,side", [(1, 3, (5, 4)), (3, 8, (2, 2)), (2, 11, (7, 6)), (2, 32, (3, 3)), (2, 45, (4, 5))]
)
def test_block_is_norm_relu_pool(tasks, channels, side, pool, sets, outermost, monkeypatch):
    """Whole and part vectors of channels, odd sides, both memory layouts, scales of either sign and zero."""
    shape = (tasks, 4, channels, *side)
    x = empty(shape, not outermost, torch.float64).copy_(normal(*shape, seed=1))

    def block(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        norm = Normalization(sets=sets)
        return norm_relu_pool(x, gamma, beta, None, pool=pool, layer="n", eps=1e-3, norm=norm)

    agree(block, [x, gammas(tasks, channels), normal(tasks, channels, seed=4)], monkeypatch)


def test_block_takes_any_memory_order(monkeypatch):
    """What lies in neither layout is copied; the gradient still finds its way."""
    x = normal(2, 4, 5, 4, 4, seed=1)

    def block(x: Tensor, gamma: Tensor) -> Tensor:
        return norm_relu_pool(x, gamma, None, None, pool=2, layer="n", eps=1e-3, norm=Normalization()).square()

    agree(block, [x, gammas(1, 5)[0]], monkeypatch)


def modes(channels: int):
    given = {"n": Moments(normal(channels, seed=8), normal(channels, seed=9).square(), 1)}
    return {"batch": Normalization(), "sets": Normalization(sets=2), "given": Normalization(given=given)}


@pytest.mark.parametrize("mode", ["batch", "sets", "given"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "inputs,channels,side", [(1, 3, (4, 4)), (1, 64, (5, 6)), (3, 20, (7, 4)), (2, 33, (4, 9)), (4, 8, (28, 28))]
)
def test_stem_is_convolution_norm_relu_pool(inputs, channels, side, shared, mode, monkeypatch):
    x = normal(2, 4, inputs, *side, seed=1) + 3  # far from zero: batch norm must not lose digits
    lead = () if shared else (2,)
    leaves = [
        normal(*lead, channels, inputs, 3, 3, seed=2),
        gammas(2, channels)[0] if shared else gammas(2, channels),
        normal(*lead, channels, seed=4),
        normal(*lead, channels, seed=5),
    ]

    def block(w: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor) -> Tensor:
        norm = modes(channels)[mode]
        if stem.fits(x, w, 1, 2):
            return stem.stem(x, w, bias, gamma, beta, layer="n", eps=1e-3, norm=norm)
        h = conv2d(x, w, padding=1)
        return norm_relu_pool(h, gamma, beta, bias, pool=2, layer="n", eps=1e-3, norm=norm)

    agree(block, leaves, monkeypatch, order=2 if mode == "given" else 3)  # there the third is zero


def test_stem_without_batch_norm(monkeypatch):
    x = normal(2, 4, 1, 6, 6, seed=1)

    def block(w: Tensor, bias: Tensor) -> Tensor:
        if stem.fits(x, w, 1, 2):
            return stem.stem(x, w, bias, None, None, layer="n", eps=0.0, norm=None)
        return torch.nn.functional.max_pool2d(
            torch.relu(conv2d(x, w, padding=1) + bias[:, None, :, None, None]).flatten(0, 1), 2
        ).unflatten(0, (2, 4))

    agree(block, [normal(2, 5, 1, 3, 3, seed=2), normal(2, 5, seed=3)], monkeypatch, order=1)  # linear but for ReLU


def test_statistics_are_those_of_the_convolution(monkeypatch):
    x, w, bias = normal(2, 3, 2, 6, 7, seed=1) + 1, normal(2, 9, 2, 3, 3, seed=2), normal(2, 9, seed=3)
    norm = Normalization(record=True)
    stem.stem(x, w, bias, None, None, layer="n", eps=1e-5, norm=norm)
    var, mean = torch.var_mean(conv2d(x, w, padding=1), dim=(1, 3, 4), correction=0)
    assert distance([norm.seen["n"].mean, norm.seen["n"].var], [mean + bias, var]) < ROUNDING
    assert norm.seen["n"].size == 3 * 6 * 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out(bad):
    """One bad pixel spoils its task, and no other."""
    x = normal(2, 3, 1, 6, 6, seed=1)
    x[1, 0, 0, 2, 2] = bad
    w, one = normal(2, 4, 1, 3, 3, seed=2), torch.ones(4, dtype=torch.float64)
    for y in (
        stem.stem(x, w, None, one, one, layer="n", eps=1e-5, norm=Normalization()),
        norm_relu_pool(x, one[:1], one[:1], None, pool=2, layer="n", eps=1e-5, norm=Normalization()),
    ):
        assert y[0].isfinite().all() and y[1].isnan().all()


def test_patches_are_computed_once_for_a_tensor_and_again_when_it_changes():
    x = normal(1, 2, 1, 4, 4, seed=1)
    first = stem.patches(x, 1)
    assert stem.patches(x, 1)[0] is first[0]
    x.mul_(2)
    assert distance(stem.patches(x, 1)[0], first[0] * 2) < ROUNDING
    del x
    assert not stem.patches.by_id


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("tasks", "channels"), [(5, 4), (1, 70), (2, 33)])
def test_threads_change_no_bit(tasks, channels, threads):
    """Split by tasks, or, where they are fewer than threads, by channels as well."""
    x, gamma = normal(tasks, 3, channels, 6, 6, seed=1), gammas(tasks, channels)
    w = normal(tasks, channels, 4, 3, 3, seed=2).requires_grad_()

    def both() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        block = norm_relu_pool(leaf, gamma, gamma, None, pool=2, layer="n", eps=1e-5, norm=Normalization())
        first = stem.stem(x[:, :, :4], w, None, None, None, layer="n", eps=1e-5, norm=Normalization())
        slopes = torch.autograd.grad((block.square().sum() + first.square().sum()), (leaf, w), create_graph=True)
        return [block, first, *slopes, *torch.autograd.grad(sum(s.square().sum() for s in slopes), (leaf, w))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = both()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, both(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_the_reason_is_told(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native._library.cache_clear()
    try:
        assert native.library(LIKE) is None
        assert "no C++ compiler" in (native.reason() or "") and "no C++ compiler" in caplog.text
    finally:
        native._library.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'no such processor' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(fake))
    native._library.cache_clear()
    try:
        assert native.library(LIKE) is None
        assert "no such processor" in (native.reason() or "")
        assert not list((tmp_path / "kernels").iterdir())
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize("a", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("b", [-1.0, 1.0])
def test_a_constant_picture_has_one_chosen_pixel(a, b):
    """Where all pixels of a window tie, the gradient goes to the first, as the library's pooling has it."""
    x = torch.ones(1, 1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    gamma, beta = torch.full((1,), a, dtype=torch.float64), torch.full((1,), b, dtype=torch.float64)
    y = norm_relu_pool(x, gamma, beta, None, pool=2, layer="n", eps=1.0, norm=Normalization())
    assert torch.equal(y, torch.full_like(y, max(b, 0.0)))


@pytest.mark.parametrize("width", [3, 16, 41, 64])
def test_single_precision_is_double_precision_to_its_rounding(width):
    """The kernels that train are built for float32: second-order MAML with them beside that in float64."""
    way, found = 3, []
    for dtype in (torch.float64, torch.float32):
        net = oracles.conv_net(way, input_shape=(2, 8, 8), width=width)
        learner = oracles.build(MAML, net, "classification", alpha=0.05, inner_steps=2).to(dtype)
        episodes = oracles.pictures(3, way=way, side=8).to(dtype)
        found.append(oracles.meta_gradient(learner, oracles.meta_batch(episodes)))
    assert native.library(torch.zeros(1)) is not None
    double, single = found
    assert distance([g.double() for g in single.grads], double.grads) < 1e-3
    assert distance([single.loss.double()], [double.loss]) < 1e-4
