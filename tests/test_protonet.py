"""Prototypical networks against their identities (float64)."""

import oracles
import pytest
import torch
from oracles import VALUES, assert_close, normal, outer_gradient
from table import create

from metalearn.algorithms import ProtoNet
from metalearn.algorithms.protonet import kernel_regression, logits, prototypes


def test_prototype_fixture():
    """P1: numbers of the specification, and the linear classifier with weights 2c and offsets -|c|^2."""
    v = {
        k: torch.tensor(x, dtype=torch.int64 if k == "labels" else torch.float64) for k, x in VALUES["protonet"].items()
    }
    centres = prototypes(v["support"][None], v["labels"][None], 2)
    scores = logits(v["query"][None], centres)
    assert_close(centres[0], v["prototypes"])
    assert_close(-scores[0], v["sq_dist"])
    assert_close(scores.softmax(-1)[0], v["prob"])
    linear = v["query"] @ v["linear_weights_2c"].T + v["linear_bias_minus_c2"]
    assert_close(linear.softmax(-1), v["prob"])


def test_one_shot_prototypes_are_the_support_embeddings():
    """P2, whatever the order of the labels; a class without examples has no prototype."""
    z, y = normal(2, 4, 3, seed=0), torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    centres = prototypes(z, y, 5)
    for i in range(2):
        assert torch.equal(centres[i, y[i]], z[i])
    assert bool(centres[:, 4].isnan().all())


def test_distances_do_not_see_how_the_space_lies():
    """P3: rotating and shifting all embeddings changes no logit."""
    z, q, y = normal(2, 6, 3, seed=0), normal(2, 4, 3, seed=1), torch.tensor([0, 1, 2]).repeat(2, 2)
    rotation, shift = torch.linalg.qr(normal(3, 3, seed=2))[0], normal(3, seed=3)
    moved = [e @ rotation + shift for e in (z, q)]
    assert_close(logits(moved[1], prototypes(moved[0], y, 3)), logits(q, prototypes(z, y, 3)))


# ---- regression --------------------------------------------------------------------------------------------------


def test_the_kernel_is_the_class_posterior_of_one_shot():
    """P4: one-hot targets, one example a class, tau = 1."""
    z, support, one = normal(2, 4, 3, seed=0), normal(2, 5, 3, seed=1), torch.ones(())
    y = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    labels = torch.arange(5).expand(2, 5)
    expected = logits(z, prototypes(support, labels, 5)).softmax(-1)
    assert_close(kernel_regression(z, support, y, one.double()), expected)


def test_the_kernel_stays_within_the_support_targets():
    """P5, and its limits: the mean for wide kernels, the nearest target for narrow ones."""
    z, support, y = normal(3, 7, 2, seed=0), normal(3, 4, 2, seed=1), normal(3, 4, 1, seed=2)
    out = kernel_regression(z, support, y, torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64))
    assert bool((out >= y.amin(1, keepdim=True)).all() and (out <= y.amax(1, keepdim=True)).all())
    wide, narrow = (kernel_regression(z, support, y, torch.tensor(t, dtype=torch.float64)) for t in (1e14, 1e-5))
    assert_close(wide, y.mean(1, keepdim=True).expand_as(wide))
    nearest = torch.cdist(z, support).argmin(-1, keepdim=True)
    assert_close(narrow, y.gather(1, nearest))


def test_the_bandwidth_is_learned():
    """Its slope is the central difference of the objective; it starts at the root of the features' number."""
    learner, episodes = create(("protonet", "regression")), oracles.curves()
    grad = outer_gradient(learner, episodes)["kernel.log_tau"]
    (slope,) = oracles.finite_differences(lambda: oracles.outer_value(learner, episodes), [learner.kernel.log_tau])
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)
    fresh = ProtoNet(net=oracles.mlp(0), kind="regression")
    assert fresh.kernel.log_tau.exp().item() == pytest.approx(3**0.5, rel=1e-6)  # float32
