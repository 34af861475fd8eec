"""Episodes: what a draw may depend on, what an image sampler promises, and the laws of the sinusoids."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from metalearn import data as data_module
from metalearn.data import Episodes, FrozenStream, TrainStream
from metalearn.datasets.base import ClassImages, ImageDataset
from metalearn.datasets.group_regression import GroupRegression
from metalearn.datasets.harmonic import Harmonic
from metalearn.datasets.mixture import Mixture
from metalearn.datasets.quadratic import Quadratic
from metalearn.datasets.sinusoid import Sinusoid
from metalearn.episode import Episode, Examples, MetaBatch
from metalearn.random import Key
from metalearn.samplers import Uniform

COUNTS = {"train": (7, 12, 9, 8, 30, 7, 11), "val": (9, 8, 10, 9), "test": (8, 10, 9, 12, 9)}


class Numbered(ImageDataset):
    """Pictures of one pixel that say which class they are of and which picture of it; classes of different sizes."""

    input_shape = (2, 1, 1)

    def load(self, split):
        count = torch.tensor(COUNTS[split])
        classes = torch.arange(len(count)).repeat_interleave(count)
        first = count.cumsum(0) - count
        images = torch.stack([classes, torch.arange(len(classes)) - first[classes]], 1).to(torch.uint8)
        return ClassImages(images[:, :, None, None], first, count, tuple(f"class {i}" for i in range(len(count))))

    def data_hash(self):
        return "numbered"


def numbered(**changes) -> Numbered:
    return Numbered(**{"way": 3, "shot": 2, "queries": 4} | changes)


def episodes(dataset=None, **changes) -> Episodes:
    settings = {"meta_batch_size": 4, "max_steps": 20, "val_every": 0, "val_episodes": 11, "test_episodes": 13}
    settings |= {"seed": 0, "evaluation_seed": 0, "dataset": dataset or numbered(), "sampler": Uniform()}
    return Episodes(**settings | changes)


def draw(dataset, split="train", tasks=200, seed=0, step=0):
    """The draw and the episodes of many tasks of one meta-step."""
    drawn = dataset.draw(split, Key(seed, "train"), torch.tensor(step), torch.arange(tasks))
    return drawn, dataset.fetch(split, drawn)


def numbers(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Class and number of each picture, `[B, n]`."""
    values = (x * 255).round().long().flatten(2).numpy()
    return values[..., 0], values[..., 1]


def flat(batches: list[MetaBatch]) -> list[dict[str, torch.Tensor]]:
    """The tasks of some stacks, one by one."""
    out = []
    for batch in batches:
        parts = {"key step": batch.key.step, "key task": batch.key.task, **batch.episodes.latent}
        for name in ("support", "query"):
            part = getattr(batch.episodes, name)
            parts |= {f"{name} x": part.x, f"{name} y": part.y}
        out += [{k: v[i] for k, v in parts.items()} for i in range(batch.episodes.tasks)]
    return out


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def interleaved(parts: list[list]) -> list:
    """Dealt out in turn to ranks, put together again."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


FAMILIES = GroupRegression(noise_std=0.1)
SECTIONS = {name: {"_target_": f"metalearn.datasets.{name}.{name.title()}"} for name in ("sinusoid", "harmonic")}
MIXED = Mixture(members=list(SECTIONS), arguments=SECTIONS)
SOURCES = [numbered(), Sinusoid(), Sinusoid(variant="trlearner_phase"), Harmonic(), Quadratic(p=2), FAMILIES, MIXED]
IDS = ["pictures", "finn", "trlearner", "harmonic", "quadratic", "families", "mixture"]
each_source = pytest.mark.parametrize("source", SOURCES, ids=IDS)


# ---- streams -----------------------------------------------------------------------------------------------------


@each_source
def test_a_frozen_episode_depends_on_its_index_alone(source):
    """Not on the stack it comes in, the rank, the number of ranks or of episodes, or the seed of the run."""
    for split in ("val", "test"):
        whole = flat(list(episodes(source).evaluation(split)))
        assert len(whole) == {"val": 11, "test": 13}[split]
        assert [int(e["key step"]) for e in whole] == list(range(len(whole)))
        for changes in ({"eval_batch": 1}, {"eval_batch": 4}, {"seed": 5, "meta_batch_size": 2, "per_call": 3}):
            assert same(flat(list(episodes(source, **changes).evaluation(split))), whole)
        for world in (2, 3):
            ranks = [flat(list(episodes(source).evaluation(split, rank, world))) for rank in range(world)]
            assert same(interleaved(ranks), whole)
        few = episodes(source, val_episodes=3, test_episodes=3)
        assert same(flat(list(few.evaluation(split))), whole[:3])


@each_source
def test_evaluation_seeds_and_splits_differ(source):
    def first(split, **changes):
        return flat(list(episodes(source, **changes).evaluation(split)))[0]["query x"]

    found = [first("val"), first("test"), first("val", evaluation_seed=1), first("test", evaluation_seed=1)]
    assert len({tuple(x.flatten().tolist()) for x in found}) == 4


@each_source
def test_training_tasks_depend_on_step_and_task_alone(source, monkeypatch):
    """Not on the block of draws, the first step, the rank or the number of ranks."""
    whole = list(episodes(source).training(0, 20))
    assert [b.step for b in whole] == list(range(20)) and {b.total for b in whole} == {4}
    assert all(b.key.task.tolist() == [0, 1, 2, 3] and set(b.key.step.tolist()) == {b.step} for b in whole)
    tasks = flat(whole)
    assert len({tuple(t["query x"].flatten().tolist()) for t in tasks}) == 80
    for block in (1, 3, 7):
        monkeypatch.setattr(data_module, "BLOCK", block)
        assert same(flat(list(episodes(source).training(0, 20))), tasks)
        assert same(flat(list(episodes(source).training(6, 14))), tasks[24:56])
    for world in (2, 4):
        ranks = [list(episodes(source).training(0, 20, rank, world)) for rank in range(world)]
        for step, batch in enumerate(whole):
            parts = [ranks[rank][step] for rank in range(world)]
            assert {p.total for p in parts} == {4}
            assert same(interleaved([flat([p]) for p in parts]), flat([batch]))
    assert not same(flat(list(episodes(source, seed=1).training(0, 20))), tasks)


def test_precision_of_inputs_and_targets():
    for source in (numbered(), Sinusoid()):
        for dtype in (torch.float32, torch.float64):
            stream = episodes(source, dtype=dtype)
            for batch in (next(stream.training(0, 1)), next(stream.evaluation("val"))):
                support = batch.episodes.support
                assert support.x.dtype == dtype
                assert support.y.dtype == (torch.int64 if source.kind == "classification" else dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    max_steps=st.integers(0, 25),
    val_every=st.integers(0, 12),
    per_call=st.integers(0, 7),
    log_every=st.integers(1, 9),
    start=st.integers(0, 25),
)
def test_training_stops_at_validations_and_at_max_steps(max_steps, val_every, per_call, log_every, start):
    """Iterated again and again from any start: each step once, full calls up to a boundary, a pause at each."""
    lengths = {"max_steps": max_steps, "val_every": val_every, "per_call": per_call, "log_every": log_every}
    stream = episodes(Sinusoid(), meta_batch_size=1, **lengths)
    stream.start, loader, seen = start, TrainStream(stream), []
    while stream.start < max_steps:
        epoch = [[b.step for b in call] for call in loader]
        for call in epoch:
            assert len({step // log_every for step in call}) == 1  # a log line is due between calls only
            full = len(call) == per_call or (call[-1] + 1) % log_every == 0
            assert 0 < len(call) and (per_call == 0 or (len(call) <= per_call and (full or call is epoch[-1])))
        seen += sum(epoch, [])
        assert stream.start == seen[-1] + 1
        boundaries = [s for s in seen if val_every and (s + 1) % val_every == 0]
        assert seen[-1] + 1 == max_steps or boundaries[-1] == seen[-1]
    assert seen == list(range(start, max_steps))
    assert list(loader) == []


def test_calls_resume_with_the_same_tasks():
    whole = [b for call in TrainStream(episodes(per_call=3, val_every=8)) for b in call]
    resumed = episodes(per_call=3, val_every=8)
    resumed.start = 5
    assert same(flat([b for call in TrainStream(resumed) for b in call]), flat(whole[5:8]))


@pytest.mark.parametrize(("count", "stack", "world"), [(11, 4, 1), (11, 4, 3), (1, 4, 2), (12, 3, 2)])
def test_frozen_streams_know_their_length(count, stack, world, monkeypatch):
    stream = episodes(Sinusoid(), val_episodes=count, eval_batch=stack)
    for rank in range(world):
        monkeypatch.setattr(stream, "_ranks", lambda rank=rank: (rank, world))
        loader = FrozenStream(stream, "val")
        assert len(loader) == len(list(loader))


# ---- pictures ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    way=st.integers(2, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    split=st.sampled_from(["train", "val", "test"]),
    labels=st.sampled_from(["mutually_exclusive", "fixed_label"]),
)
def test_episodes_have_what_was_asked_for(way, sizes, split, labels):
    """Way, shot and queries exact; distinct classes; distinct pictures of the right class; ordered by label."""
    shot, queries = sizes
    dataset = numbered(way=way, shot=shot, queries=queries, label_assignment=labels)
    drawn, found = draw(dataset, split, tasks=30)
    for part, n in ((found.support, shot), (found.query, queries)):
        assert part.x.shape == (30, way * n, 2, 1, 1) and part.x.dtype == torch.float32
        assert part.y.tolist() == [[label for label in range(way) for _ in range(n)]] * 30
    classes, pictures = (
        np.concatenate([a.reshape(30, way, -1), b.reshape(30, way, -1)], 2)
        for a, b in zip(numbers(found.support.x), numbers(found.query.x), strict=True)
    )
    assert (classes == drawn["class_ids"].numpy()[..., None]).all()
    assert torch.equal(found.latent["class_ids"], drawn["class_ids"])
    for task in range(30):
        assert len(set(classes[task, :, 0])) == way
        for label in range(way):
            chosen = pictures[task, label]
            assert len(set(chosen)) == shot + queries  # support and query are disjoint
            assert chosen.max() < COUNTS[split][classes[task, label, 0]]


def test_labels_and_pictures_are_uniform():
    """Every ordered pair of classes equally often, and every picture of a class in every place."""
    classes = draw(numbered(way=2, test_way=2), "val", tasks=2400)[0]["class_ids"]
    pairs = torch.bincount(classes[:, 0] * 4 + classes[:, 1], minlength=16).reshape(4, 4)
    assert pairs.diagonal().tolist() == [0] * 4
    assert chisquare(pairs[~torch.eye(4, dtype=torch.bool)].numpy()).pvalue > 1e-3
    dataset = numbered(way=7, shot=1, queries=1)
    drawn, found = draw(dataset, tasks=1500)
    for part in (found.support, found.query):
        which, picture = (n.flatten() for n in numbers(part.x))
        for c, count in enumerate(COUNTS["train"]):
            assert chisquare(np.bincount(picture[which == c], minlength=count)).pvalue > 1e-4


def labels_of(classes: torch.Tensor) -> dict[int, set[int]]:
    """Class -> the labels it was given."""
    found: dict[int, set[int]] = {}
    for task in classes.tolist():
        for label, c in enumerate(task):
            found.setdefault(c, set()).add(label)
    return found


def test_fixed_labels():
    """In training a class always has one label, groups differ by at most one in size; elsewhere labels stay random."""
    dataset = numbered(label_assignment="fixed_label")
    found = labels_of(
        torch.cat([draw(dataset, tasks=150, seed=s, step=t)[0]["class_ids"] for s in (0, 1) for t in (0, 9)])
    )
    assert set(found) == set(range(7)) and all(len(labels) == 1 for labels in found.values())
    sizes = np.bincount([label for labels in found.values() for label in labels])
    assert sizes.tolist() == [2, 2, 3]
    for split in ("val", "test"):
        assert all(labels == {0, 1, 2} for labels in labels_of(draw(dataset, split)[0]["class_ids"]).values())
    assert (dataset.label_space, numbered().label_space) == ("shared", "permuted")
    groups = {tuple(sorted((c, *label) for c, label in found.items())) for found in (
        labels_of(draw(numbered(label_assignment="fixed_label", seed=seed))[0]["class_ids"]) for seed in range(3)
    )}  # fmt: skip
    assert len(groups) == 3  # dataset.seed draws them
    assert all(labels == {0, 1, 2} for labels in labels_of(draw(numbered())[0]["class_ids"]).values())


def test_classes_of_a_fixed_label_are_equally_likely():
    classes = draw(numbered(label_assignment="fixed_label"), tasks=3000)[0]["class_ids"]
    for label in range(3):
        counts = torch.bincount(classes[:, label])
        assert chisquare(counts[counts > 0].numpy()).pvalue > 1e-3


def test_training_and_test_may_differ_in_size():
    dataset = numbered(way=5, shot=1, queries=6, test_way=3, test_shot=4, test_queries=2)
    sizes = {s: (dataset.outputs(s), *(p.x.shape[1] for p in draw(dataset, s)[1][:2])) for s in COUNTS}
    assert sizes == {"train": (5, 5, 30), "val": (3, 12, 6), "test": (3, 12, 6)}
    alike = numbered(test_shot=1)
    assert {s: alike.outputs(s) for s in COUNTS} == {"train": 3, "val": 3, "test": 3}
    assert draw(alike, "test")[1].support.x.shape[1] == 3 and draw(alike, "test")[1].query.x.shape[1] == 12


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"way": 8}, "train", r"dataset.way = 8 exceeds the 7 classes of split 'train'"),
        ({"way": 5}, "val", r"dataset.way = 5 exceeds the 4 classes of split 'val'"),
        ({"queries": 6}, "train", "= 8 exceeds the 7 images of class 'class 0' in split 'train'"),
        ({"test_way": 5}, "val", r"dataset.test_way = 5 exceeds the 4 classes of split 'val'"),
        ({"shot": 6, "queries": 1, "test_queries": 4}, "test", "10 exceeds the 8 .*; lower dataset.test_queries"),
        ({"test_shot": 9}, "test", r"dataset.test_shot \+ dataset.queries = 13 exceeds the 8 images"),
    ],
)  # fmt: skip
def test_what_the_pictures_do_not_allow_is_refused(changes, split, message):
    with pytest.raises(ValueError, match=message):
        draw(numbered(**changes), split)


def test_draws_are_those_of_one_at_a_time():
    """Draws for a block of steps are stacked draws of single tasks."""
    for dataset in SOURCES:
        key = Key(0, "train")
        block = dataset.draw("train", key, torch.arange(3)[:, None], torch.arange(4)[None])
        for step in range(3):
            for task in range(4):
                single = dataset.draw("train", key, torch.tensor(step), torch.tensor(task))
                assert all(torch.equal(block[k][step, task], single[k]) for k in block)


# ---- sinusoids ---------------------------------------------------------------------------------------------------

PI = math.pi
LAWS = {  # ranges of amplitude, angular frequency and b; y; noise (contract, section 6)
    "finn": ((0.1, 5), (1, 1), (0, PI), lambda x, a, w, b: a * np.sin(x - b), 0),
    "reptile": ((0.1, 5), (1, 1), (0, 2 * PI), lambda x, a, w, b: a * np.sin(x + b), 0),
    "unravel": ((0, PI), (1, 1), (0, PI), lambda x, a, w, b: a * np.sin(x + b), 0),
    "trlearner_offset": ((0.1, 5), (0.5, 2), (0, 2 * PI), lambda x, a, w, b: a * np.sin(w * x) + b, 0.3),
    "trlearner_phase": ((0.1, 5), (0.5, 2), (0, 2 * PI), lambda x, a, w, b: a * np.sin(w * x + b), 0.3),
}
each_law = pytest.mark.parametrize("variant", LAWS)


@each_law
def test_sinusoids_follow_their_law_and_noise(variant):
    """Residuals are zero where targets are clean, and N(0, 0.3) where they are noisy, at every point by itself."""
    law, sd = LAWS[variant][3:]
    dataset = Sinusoid(variant=variant, shot=5, queries=7, test_shot=6, test_queries=9)
    for split in ("train", "val", "test"):
        found = draw(dataset, split, tasks=500)[1]
        latent = [found.latent[k].double().numpy()[:, None] for k in ("amplitude", "frequency", "b")]
        for name, part, n in (("support", found.support, (5, 6)), ("query", found.query, (7, 9))):
            assert part.x.shape == part.y.shape == (500, n[split != "train"], 1)
            x, y = part.x[..., 0].double().numpy(), part.y[..., 0].double().numpy()
            residual = y - law(x, *latent)
            if sd and (split == "train" or name == "support"):
                assert kstest(residual.flatten() / sd, "norm").pvalue > 1e-3
                assert abs(np.corrcoef(residual.T) - np.eye(n[split != "train"])).max() < 0.2
            else:
                assert abs(residual).max() < 2e-5


@each_law
def test_sinusoids_cover_their_ranges_evenly(variant):
    amplitude, frequency, b = LAWS[variant][:3]
    found = draw(Sinusoid(variant=variant, test_shot=1, test_queries=1), "val", tasks=20_000)[1]
    for name, (low, high) in {"amplitude": amplitude, "frequency": frequency, "b": b}.items():
        values = found.latent[name].double().numpy()
        if low == high:
            assert (values == low).all()
        else:
            assert low <= values.min() and values.max() <= high
            assert kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
    for part in (found.support, found.query):
        assert kstest(part.x.double().numpy().flatten(), "uniform", (-5, 10)).pvalue > 1e-3


def curves(dataset: Sinusoid, split: str, tasks: int, seed: int = 0) -> set[tuple[float, ...]]:
    return set(map(tuple, draw(dataset, split, tasks, seed)[0]["curve"].tolist()))


@each_law
def test_training_tasks_are_fixed_where_the_law_says_so(variant):
    """480 of them whatever the run's seed, others with dataset.seed, fresh ones in test; else always fresh."""
    dataset = Sinusoid(variant=variant)
    if not LAWS[variant][4]:
        assert len(curves(dataset, "train", 2000)) == 2000
        return
    fixed = curves(dataset, "train", 10_000)
    assert len(fixed) == 480 and curves(dataset, "train", 10_000, seed=1) == fixed
    assert not fixed & curves(Sinusoid(variant=variant, seed=1), "train", 2000)
    assert len(curves(dataset, "test", 2000) - fixed) == 2000
    points = draw(dataset, tasks=10_000)[0]
    assert len(set(points["x"][:, 0].tolist())) > 9_900  # a task comes again with fresh points and noise
    assert len(set(points["noise"][:, 0].tolist())) > 9_900


def test_sinusoid_sizes():
    dataset = Sinusoid(shot=3)
    assert draw(dataset, "train")[1].query.x.shape[1] == 10 and draw(dataset, "test")[1].query.x.shape[1] == 100
    assert draw(dataset, "test")[1].support.x.shape[1] == 3
    alike = Sinusoid(shot=3, queries=4, test_queries=None)
    assert draw(alike, "test")[1].query.x.shape[1] == 4
    assert {dataset.outputs(s) for s in COUNTS} == {1} and dataset.input_shape == (1,)


def test_a_stream_that_starts_anywhere_has_the_same_bits():
    """Draws and tasks are made in blocks and groups that do not depend on where a run is resumed."""
    whole = list(episodes(Sinusoid(), meta_batch_size=3).training(0, 300))
    for first in (1, 129, 131, 255):
        later = list(episodes(Sinusoid(), meta_batch_size=3).training(first, 300))
        assert same(flat(later), flat(whole[first:]))


# ---- corrupted tasks ---------------------------------------------------------------------------------------------


def test_one_task_in_five_is_corrupted_in_training_alone():
    """Its targets are another order of the clean ones, drawn by coordinates; inputs and all other tasks are equal."""
    clean, bad = (
        episodes(dataset=Sinusoid(), sampler=s, meta_batch_size=10, max_steps=4)
        for s in (Uniform(), Uniform(corrupted=0.2))
    )
    for a, b in zip(clean.training(0, 4), bad.training(0, 4), strict=True):
        for whole, part in zip(a.episodes[:2], b.episodes[:2], strict=True):
            assert torch.equal(whole.x, part.x)
            assert (whole.y != part.y).flatten(1).any(1).nonzero()[:, 0].tolist() == [4, 9]
            assert torch.equal(whole.y.sort(1).values, part.y.sort(1).values)
    resumed = list(bad.training(2, 4))
    assert all(torch.equal(a.episodes.query.y, b.episodes.query.y) for a, b in zip(
        resumed, list(bad.training(0, 4))[2:], strict=True))  # fmt: skip
    for a, b in zip(clean.evaluation("val"), bad.evaluation("val"), strict=True):
        assert torch.equal(a.episodes.query.y, b.episodes.query.y)


@pytest.mark.parametrize("share, expected", [(0.0, []), (0.3, [3, 6, 9]), (1.0, list(range(10)))])
def test_the_share_of_corrupted_tasks_is_exact(share, expected):
    y = torch.arange(50).float().view(1, 50, 1).expand(10, -1, -1)
    stack, task = Episode(Examples(y, y), Examples(y, y), {}), torch.arange(10)
    out = Uniform(corrupted=share).corrupt(stack, Key(0, "c"), torch.zeros_like(task), task)
    assert (out.support.y != y).flatten(1).any(1).nonzero()[:, 0].tolist() == expected
