"""Prototypical networks against their identities (float64)."""

import torch
from oracles import VALUES, assert_close, normal

from metalearn.algorithms.protonet import logits, prototypes


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
