"""Matching networks against their identities (float64)."""

from typing import Any

import oracles
import pytest
import torch
from oracles import VALUES, assert_close, build, normal
from torch import Tensor

from metalearn.algorithms import MatchingNet
from metalearn.algorithms.matchingnet import attention, cosines


def test_fixture():
    """Numbers of the specification: cosines, attention, class probabilities, sums of cosines."""
    v = VALUES["matching"]
    support, query = (torch.tensor(x, dtype=torch.float64) for x in (v["support"], [v["query"]]))
    y = torch.tensor([v["labels"]])
    cosine = cosines(query[None], support[None])
    assert_close(cosine[0, 0], torch.tensor(v["cos"], dtype=torch.float64))
    log_p = attention(cosine, y, 2, 1.0)[0, 0]
    torch.testing.assert_close(
        log_p.exp(), torch.tensor(v["posterior_softmax_attention"], dtype=torch.float64), rtol=1e-7, atol=2e-8
    )
    sums = learner(attention="sum_cos").compare({}, support[None], y, query[None])[0, 0]
    assert_close(sums, torch.tensor(v["sum_cos_logits"], dtype=torch.float64))


def scores(learner: MatchingNet, z: Tensor, support: Tensor, y: Tensor) -> Tensor:
    return learner.compare(learner.theta(), support, y, z)


def learner(**arguments: Any) -> MatchingNet:
    return build(MatchingNet, oracles.mlp(0, hidden=(4,)), "classification", **arguments)


Z, SUPPORT, LABELS = normal(2, 6, 4, seed=0), normal(2, 3, 4, seed=1), torch.tensor([[0, 1, 2], [2, 0, 1]])


def test_probabilities_sum_to_one():
    """MN1, up to the 1e-8 added to each."""
    p = scores(learner(), Z, SUPPORT, LABELS).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 6, dtype=torch.float64), rtol=0, atol=4e-8)


def test_a_large_scale_is_the_nearest_neighbour():
    """MN2, one shot."""
    nearest = LABELS.gather(1, cosines(Z, SUPPORT).argmax(-1))
    assert torch.equal(scores(learner(scale=1e4), Z, SUPPORT, LABELS).argmax(-1), nearest)
    assert torch.equal(scores(learner(attention="sum_cos"), Z, SUPPORT, LABELS).argmax(-1), nearest)


def test_duplicates_change_attention_nowhere_and_sums_by_their_number():
    """MN3."""
    twice, labels = SUPPORT.repeat(1, 2, 1), LABELS.repeat(1, 2)
    assert_close(scores(learner(), Z, twice, labels), scores(learner(), Z, SUPPORT, LABELS))
    sums = learner(attention="sum_cos")
    assert_close(scores(sums, Z, twice, labels), 2 * scores(sums, Z, SUPPORT, LABELS))


@pytest.mark.parametrize("attention", ["softmax", "sum_cos"])
def test_lengths_do_not_matter(attention):
    """MN4."""
    given = learner(attention=attention)
    assert_close(scores(given, 3 * Z, 0.1 * SUPPORT, LABELS), scores(given, Z, SUPPORT, LABELS))


@pytest.mark.parametrize("attention", ["softmax", "sum_cos"])
def test_support_order_does_not_matter_without_context(attention):
    order, given = torch.tensor([2, 0, 1]), learner(attention=attention)
    assert_close(scores(given, Z, SUPPORT[:, order], LABELS[:, order]), scores(given, Z, SUPPORT, LABELS))


def sigmoid_gates(x: Tensor, h: Tensor, c: Tensor, params: dict[str, Tensor], suffix: str) -> tuple[Tensor, Tensor]:
    """One LSTM step written out; gates in the order i, f, g, o."""
    both = x @ params[f"weight_ih{suffix}"].T + params[f"bias_ih{suffix}"]
    i, f, g, o = (both + h @ params[f"weight_hh{suffix}"].T + params[f"bias_hh{suffix}"]).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def test_context_is_the_librarys_lstm():
    """Its bidirectional one over the support set."""
    given = learner(context=True)
    expected = given.support_lstm(SUPPORT)[0].chunk(2, -1)
    assert_close(
        given.support_in_context(dict(given.support_lstm.named_parameters()), SUPPORT), SUPPORT + sum(expected)
    )


def test_context_embeddings_are_a_plain_loop():
    """Appendix A: one sequence and one query at a time."""
    given = learner(context=True)
    support, queries = (dict(m.named_parameters()) for m in (given.support_lstm, given.query_lstm))
    zero = torch.zeros(4, dtype=torch.float64)
    g, h = given.support_in_context(support, SUPPORT), None
    for b in range(2):
        states = {}
        for suffix, order in (("_l0", [0, 1, 2]), ("_l0_reverse", [2, 1, 0])):
            h, c = zero, zero
            for j in order:
                h, c = sigmoid_gates(SUPPORT[b, j], h, c, support, suffix)
                states[suffix, j] = h
        expected = torch.stack([SUPPORT[b, j] + states["_l0", j] + states["_l0_reverse", j] for j in range(3)])
        assert_close(g[b], expected)
        for n in range(6):
            f = Z[b, n]
            h, c, r = f, zero, g[b].mean(0)
            for _ in range(given.reads):
                h, c = sigmoid_gates(torch.cat([f, r]), h, c, queries, "")
                h = h + f
                r = (g[b] @ h).softmax(0) @ g[b]
            assert_close(given.query_in_context(queries, Z, g)[b, n], h)


def test_a_zero_probability_has_a_finite_loss():
    given = learner(scale=1e4)
    out = scores(given, Z, SUPPORT, LABELS)
    assert bool(out.isfinite().all()) and bool(given.loss(out, LABELS.repeat(1, 2)).isfinite().all())
