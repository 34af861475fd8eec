"""Counter-based draws: known answers, uniform laws, and no state anywhere."""

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from scipy.special import ndtr
from scipy.stats import chisquare
from torch import Tensor

from metalearn.random import Key, TaskKey, philox

KEY = Key(3, "test")
DRAWS: dict[str, Callable[..., Tensor]] = {  # of the coordinates
    "words": lambda *index: KEY.words(6, *index),
    "uniform": lambda *index: KEY.uniform(5, *index, low=-2, high=3),
    "normal": lambda *index: KEY.normal(5, *index),
    "integers": lambda *index: KEY.integers(5, *index, size=7),
    "choice": lambda *index: KEY.choice(5, *index, size=7),
    "permutation": lambda *index: KEY.permutation(5, *index),
}


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (" ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, answer):
    """From the authors' library, Random123 (kat_vectors, philox4x32-10)."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in hexadecimal(counter))
    k0, k1 = hexadecimal(key)
    assert [int(word) for word in philox((c0, c1, c2, c3), (k0, k1))] == hexadecimal(answer)


def test_the_stream_of_a_key_is_fixed():
    """Frozen test episodes are made of these numbers: a change would orphan every stored result."""
    assert Key(0, "episodes").words(3, 1, 2).tolist() == [1667082836, 3453411960, 548209748]
    assert Key(0, "episodes").sub("classes").integer() == 756605397561107865


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_vectorised_is_one_at_a_time(draw):
    step, task = torch.tensor([[0], [1], [2**32 - 1]]), torch.tensor([0, 1, 5, 2**31])
    together = draw(step, task)
    assert together.shape[:2] == (3, 4)
    for i, s in enumerate(step.flatten().tolist()):
        for j, t in enumerate(task.tolist()):
            assert torch.equal(together[i, j], draw(s, t))


def test_streams_differ():
    """By seed, name, and every coordinate and its place."""
    keys = [Key(0), Key(1), Key(0, "a"), Key(0).sub("a"), Key(0).sub("b"), Key(0).sub("a").sub("b"), Key(0).sub("ab")]
    index = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    draws = {tuple(key.words(2, *i).tolist()) for key in keys for i in index}
    assert len(draws) == len(keys) * len(index)


def assert_uniform(values: Tensor, bins: int) -> None:
    """Chi-square on 0..bins-1; the draws are fixed, so a p above one in a thousand holds for ever."""
    counts = torch.bincount(values.flatten(), minlength=bins)
    assert len(counts) == bins
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_laws():
    """A hundred equally likely bins, over words of one coordinate and over coordinates."""
    index = torch.arange(5000)
    u = KEY.uniform(4, index)
    assert 0 <= float(u.min()) <= float(u.max()) < 1
    assert_uniform((u * 100).long(), 100)
    stretched = KEY.uniform(4, index, low=-2, high=3)
    torch.testing.assert_close(stretched, 5 * u - 2)
    z = KEY.normal(4, index)
    assert_uniform(torch.as_tensor(ndtr(z.double().numpy()) * 100).long(), 100)
    assert abs(float(torch.corrcoef(z.T).triu(1).abs().max())) < 4 / math.sqrt(5000)  # four standard errors
    assert_uniform(KEY.integers(4, index, size=10), 10)
    assert_uniform(KEY.words(4, index) >> 24, 256)
    assert_uniform(KEY.words(4, index) & 255, 256)


@pytest.mark.parametrize("n, size", [(2, 4), (3, 3), (1, 5), (3, 5)])
def test_choice_is_uniform_over_ordered_samples(n, size):
    """All size (size - 1) ... ordered samples without repetition, equally often."""
    samples = list(permutations(range(size), n))
    rank = {sample: i for i, sample in enumerate(samples)}
    draws = KEY.choice(n, torch.arange(4000), size=size).tolist()
    assert_uniform(torch.tensor([rank[tuple(draw)] for draw in draws]), len(samples))


def test_permutation_is_uniform():
    rank = {order: i for i, order in enumerate(permutations(range(4)))}
    draws = KEY.permutation(4, torch.arange(6000)).tolist()
    assert_uniform(torch.tensor([rank[tuple(draw)] for draw in draws]), 24)


def test_sizes_may_differ_between_coordinates():
    size, index = torch.tensor([3, 4, 1000, 2**31]), torch.arange(4)
    chosen, drawn = KEY.choice(3, index, size=size), KEY.integers(3, index, size=size[:, None])
    for i, s in enumerate(size.tolist()):
        assert torch.equal(chosen[i], KEY.choice(3, i, size=s))
        assert torch.equal(drawn[i], KEY.integers(3, i, size=s))
        assert len(set(chosen[i].tolist())) == 3
        assert 0 <= int(chosen[i].min()) <= int(chosen[i].max()) < s


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="cannot choose 4 distinct values from 3"):
        KEY.choice(4, torch.arange(2), size=torch.tensor([9, 3]))
    with pytest.raises(ValueError, match="at most three coordinates, got 4"):
        KEY.words(1, 0, 0, 0, 0)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_no_global_state_is_read_or_changed(draw):
    torch.manual_seed(0)
    first, state = draw(1), torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(0).get_state())
    torch.manual_seed(1)
    assert torch.equal(draw(1), first)


def test_some_tasks_of_a_key_draw_what_all_would():
    key = TaskKey(KEY, torch.full((5,), 7), torch.arange(5)).sub("minibatch")
    orders = key.permutations(6, 3)
    assert orders.shape == (5, 3, 6)
    assert torch.equal(orders.sort(-1).values, torch.arange(6).expand(5, 3, 6))
    assert len({tuple(order) for order in orders.flatten(0, 1).tolist()}) == 15
    for part in (slice(1, 3), torch.tensor([4, 0])):
        assert torch.equal(key.select(part).permutations(6, 3), orders[part])
    assert torch.equal(KEY.sub("minibatch").permutation(6, 7, 2, 1), orders[2, 1])
