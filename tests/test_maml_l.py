"""MAML-L: larger networks by parameter count, and blocks that keep the size of the picture."""

import oracles
import pytest
import torch
from oracles import assert_close, outer_gradient
from runs import cell_of, checkpoint, result
from table import create

from metalearn.backbones import Conv4
from metalearn.cells import expand
from metalearn.enlarge import enlarged
from metalearn.ledger import CellDir
from metalearn.objects import build
from metalearn.record import table
from metalearn.run import build_learner, run
from metalearn.schema import BadInput
from metalearn.schema.algorithms import SIZES

SINE, GLYPHS, CIFAR, MINI = (1,), (1, 28, 28), (3, 32, 32), (3, 84, 84)


def section(name: str) -> dict:
    (cell,) = expand([f"dataset={'sinusoid' if name.startswith('mlp') else 'glyphs'}", f"backbone={name}"])
    return cell.config["backbone"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "shape", "widths", "error"),
    [
        ("conv4_mini", MINI, (41, 72), 0.02),  # the widths of the specification
        ("conv4_mini", GLYPHS, (39, 69), 0.025),  # 40 filters would be 2.7 % more
        ("conv4_cifarfs", CIFAR, (40, 69), 0.02),
        ("conv4_omniglot", GLYPHS, (79, 136), 0.02),
        ("conv4_mmaml", CIFAR, (147, 254), 0.02),
        ("mlp_sine", SINE, (41, 72), 0.02),
        ("mlp_reptile", SINE, (65, 113), 0.02),
    ],
)
def test_the_count_is_three_times_one_network_or_all_of_tsa_mamls(name, shape, widths, error, size):
    """Counted on the networks themselves; deeper by 3 blocks, or by 3/4 of the hidden layers."""
    outputs = 1 if shape == SINE else 5
    found = enlarged(section(name), SIZES[size], input_shape=shape, outputs=outputs)
    nets = [build("backbone", s, input_shape=shape, outputs=outputs) for s in (section(name), found.backbone)]
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts == [found.single, found.parameters]
    assert abs(found.parameters / found.single / SIZES[size] - 1) < error
    width = widths[list(SIZES).index(size)]
    if shape == SINE:
        assert found.backbone == section(name) | {"hidden": [width] * 4}
    else:
        grown = {"width": width, "growth": 1, "blocks": 7, "pooled_blocks": 4}
        assert found.backbone == section(name) | grown
        assert nets[1].stage("block7").shape[1:] == nets[0].stage("block4").shape[1:]


@pytest.mark.parametrize("times", [0.01, 1, 2.5, 40])
def test_no_other_width_is_nearer(times):
    found = enlarged(section("mlp_sine"), times, input_shape=SINE, outputs=1)
    width, goal = found.backbone["hidden"][0], times * found.single
    for other in {max(1, width - 1), width + 1} - {width}:
        net = build("backbone", found.backbone | {"hidden": [other] * 4}, input_shape=SINE, outputs=1)
        assert abs(sum(p.numel() for p in net.parameters()) - goal) >= abs(found.parameters - goal)


@pytest.mark.parametrize("downsample", ["maxpool", "stride"])
@pytest.mark.parametrize("bn", [True, False])
def test_later_blocks_keep_the_size_of_the_picture(downsample, bn):
    """Outer gradients by a plain loop, in float64; one of three blocks halves."""
    net = oracles.conv_net(blocks=3, pooled_blocks=1, downsample=downsample, bn=bn)
    assert [net.stage(f"block{i}").shape for i in (1, 2, 3)] == [(3, 3, 3)] * 3
    assert net.stage("block1").width == (3 * 36 if downsample == "maxpool" else 27) and net.stage("block3").width == 27
    learner, episodes = create(("maml", "classification"), net), oracles.pictures()
    value, grads = oracles.plain_maml(learner, episodes)
    assert_close(list(outer_gradient(learner, episodes).values()), grads, rtol=1e-11)
    assert_close(learner.task_loss(learner.theta(), episodes).loss.detach(), value)


def test_compiled_kernels_know_blocks_that_keep_the_size():
    """In float32 the first block's kernel expects pooling; others must not use it. Tolerance: float32 sums."""
    net = Conv4(input_shape=(1, 12, 12), outputs=5, width=8, blocks=3, pooled_blocks=1)
    torch.manual_seed(0)
    net.reset(oracles.Key(0, "init"))
    params, x = dict(net.named_parameters()), torch.rand(2, 10, 1, 12, 12)
    ours = net.run(params, x)
    plain = torch.stack([oracles.forward(net, params, task) for task in x])
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_run_says_which_network_it_trained(tmp_path):
    cell = cell_of(tmp_path, "algorithm=maml_l", "trainer.max_steps=2", "trainer.val_every=0", "evaluation.steps=last")
    assert run(cell) == "done"
    found = result(tmp_path, cell)
    assert found["network"]["backbone"] == cell.config["backbone"] | {"hidden": [41] * 4}
    held = sum(p.numel() for k, p in checkpoint(tmp_path, cell)["learner"].items() if k.startswith("net."))
    assert found["network"]["parameters"] == held == 5290 and found["network"]["single"] == 1761
    said = table(found, CellDir(tmp_path, cell.cell_id))
    assert "network: hidden [41, 41, 41, 41]; 5,290 parameters, 3.00 times 1,761" in said
    plain = cell_of(tmp_path, "algorithm=maml", "trainer.max_steps=2", "trainer.val_every=0", "evaluation.steps=last")
    assert plain.train_id != cell.train_id and run(plain) == "done" and "network" not in result(tmp_path, plain)


def test_size_belongs_to_every_kind_of_maml():
    (cell,) = expand(["dataset=glyphs", "algorithm=anil", "algorithm.network_size=3x_tsa"])
    dataset = build("dataset", cell.config["dataset"])
    learner = build_learner(cell.config, dataset)
    assert learner.enlarged is not None and learner.enlarged.backbone["width"] == 136


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("backbone=module backbone.factory=test_module:flat", "must be null with backbone=module"),
        ("algorithm.network_size=4x", "algorithm.network_size=4x: must be one of 3x_single, 3x_tsa"),
        ("backbone.pooled_blocks=5", "backbone.pooled_blocks=5: must be <= backbone.blocks=4"),
        (
            "backbone=conv4_mini backbone.blocks=9 backbone.pooled_blocks=5",
            "backbone.pooled_blocks=5: must be <= 4 for",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(BadInput) as error:
        expand(["algorithm=maml_l", *arguments.split()])
    assert message in str(error.value)
