"""Data sets whose tasks come in groups: who gets which group, what a group is, and what results say of it."""

import numpy as np
import pandas as pd
import pytest
import tiny_omniglot
import torch
from numpy.polynomial import Polynomial
from runs import cell_of, folder, result
from scipy import ndimage
from scipy.stats import chisquare, kstest
from test_omniglot import LISTS

from metalearn import training
from metalearn.cells import expand
from metalearn.data import Episodes
from metalearn.datasets import appearances, glyph_inventory, omniglot_files
from metalearn.datasets.glyphs import Glyphs
from metalearn.datasets.group_pictures import GroupGlyphs, GroupOmniglot
from metalearn.datasets.group_regression import GroupRegression
from metalearn.datasets.grouped import draw_groups
from metalearn.datasets.omniglot import Omniglot
from metalearn.episode import MetaBatch
from metalearn.ledger import CellDir
from metalearn.random import Key
from metalearn.record import table
from metalearn.run import run
from metalearn.samplers import Uniform
from metalearn.schema import BadInput

FAMILIES = ("sine", "line", "quadratic", "cubic")


def frozen(dataset, split: str = "test", count: int = 24, **changes) -> list[MetaBatch]:
    """Validation or test episodes, as a run has them."""
    sizes = {"meta_batch_size": 4, "max_steps": 20, "val_every": 0, "val_episodes": count, "test_episodes": count}
    seeds = {"seed": 0, "evaluation_seed": 0}
    return list(Episodes(dataset, Uniform(), **sizes | seeds | changes).evaluation(split))


def flat(batches: list[MetaBatch]) -> list[dict[str, torch.Tensor]]:
    """Their tasks, one by one."""
    out = []
    for batch in batches:
        (support, query, latent) = batch.episodes
        parts = {"sx": support.x, "sy": support.y, "qx": query.x, "qy": query.y, **latent}
        out += [{k: v[i] for k, v in parts.items()} for i in range(batch.episodes.tasks)]
    return out


def same(a: list[dict], b: list[dict]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def training_tasks(dataset, tasks: int, seed: int = 0, step: int = 0):
    """The episodes of many training tasks of one meta-step."""
    return dataset.fetch("train", dataset.draw("train", Key(seed, "train"), torch.tensor(step), torch.arange(tasks)))


# ---- who gets which group ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 3, 0.8], [0, 1, 2], [2.5]])
def test_training_draws_groups_with_their_weights(weights):
    """Chi-square over 30,000 tasks; a weight of zero is never drawn."""
    found = draw_groups("train", Key(0, "train"), torch.arange(300)[:, None], torch.arange(100)[None], weights)
    assert found.shape == (300, 100) and found.dtype == torch.int64
    counts = torch.bincount(found.flatten(), minlength=len(weights)).numpy()
    expected = 30_000 * np.array(weights) / sum(weights)
    assert (counts[expected == 0] == 0).all()
    assert len(weights) == 1 or chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_groups_of_a_meta_step_are_independent():
    """Neither neighbouring tasks nor neighbouring steps go together."""
    found = draw_groups("train", Key(0, "train"), torch.arange(3000)[:, None], torch.arange(2)[None], [1, 1, 1])
    for a, b in ((found[:, 0], found[:, 1]), (found[1:, 0], found[:-1, 0])):
        assert chisquare(torch.bincount(3 * a + b, minlength=9).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("split", ["val", "test"])
def test_frozen_episodes_take_groups_in_turn(split):
    """Episode i has group i modulo m, whatever seeds, weights, stacks and ranks."""
    for changes in ({}, {"seed": 3, "evaluation_seed": 2}, {"eval_batch": 5}):
        episodes = flat(frozen(GroupRegression(), split, 20, **changes))
        assert [int(e["group"]) for e in episodes] == [i % 3 for i in range(20)]
    steps = torch.arange(9)
    assert torch.equal(draw_groups(split, Key(5, "x"), steps, torch.tensor(0), [0, 1, 5]), steps % 3)


# ---- families of curves ------------------------------------------------------------------------------------------

RANGES = {  # algorithms: HSML's toy mixture
    "sine": {"amplitude": (0.1, 5), "frequency": (0.8, 1.2), "constant": (0, 2 * np.pi)},
    "line": {"linear": (-3, 3), "constant": (-3, 3)},
    "quadratic": {"quadratic": (-0.2, 0.2), "linear": (-2, 2), "constant": (-3, 3)},
    "cubic": {"cubic": (-0.1, 0.1), "quadratic": (-0.2, 0.2), "linear": (-2, 2), "constant": (-3, 3)},
}
PARAMETERS = ("amplitude", "frequency", "constant", "linear", "quadratic", "cubic")


def curve(name: str, latent: dict[str, float], x: np.ndarray) -> np.ndarray:
    """A family's own formula, in float64."""
    if name == "sine":
        return latent["amplitude"] * np.sin(latent["frequency"] * x) + latent["constant"]
    degree = {"line": 1, "quadratic": 2, "cubic": 3}[name]
    return Polynomial([latent[k] for k in ("constant", "linear", "quadratic", "cubic")][: degree + 1])(x)


@pytest.mark.parametrize("split", ["train", "test"])
def test_targets_follow_the_law_of_their_family(split):
    """Recomputed from the latent parameters, task by task; float32 of values up to about 40."""
    dataset = GroupRegression(families=FAMILIES, shot=6, queries=9, test_shot=5, test_queries=8)
    drawn = dataset.draw(split, Key(1, "train"), torch.arange(40)[:, None], torch.arange(3)[None])
    found = dataset.fetch(split, {k: v.flatten(0, 1) for k, v in drawn.items()})
    n = {"train": (6, 9), "test": (5, 8)}[split]
    for part, count in ((found.support, n[0]), (found.query, n[1])):
        assert part.x.shape == part.y.shape == (120, count, 1)
        for i in range(120):
            name = FAMILIES[found.latent["group"][i]]
            latent = {k: float(found.latent[k][i]) for k in PARAMETERS}
            expected = curve(name, latent, part.x[i, :, 0].double().numpy())
            np.testing.assert_allclose(part.y[i, :, 0].numpy(), expected, rtol=0, atol=2e-5)


def test_parameters_cover_the_ranges_of_their_family():
    """Kolmogorov-Smirnov for each range; what a family has no use for is zero."""
    found = training_tasks(GroupRegression(families=FAMILIES), 20_000)
    for i, name in enumerate(FAMILIES):
        for parameter in PARAMETERS:
            values = found.latent[parameter][found.latent["group"] == i].double().numpy()
            low, high = RANGES[name].get(parameter, (0, 0))
            if low == high:
                assert (values == 0).all()
            else:
                assert low <= values.min() and values.max() <= high
                assert kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
    for part in (found.support, found.query):
        assert kstest(part.x.double().numpy().flatten(), "uniform", (-5, 10)).pvalue > 1e-3


def test_noise_is_on_training_targets_and_support_sets():
    """N(0, noise_std) there and nothing on the query targets of test, beside the same points without noise."""
    noisy, clean = GroupRegression(noise_std=0.3), GroupRegression()
    for split in ("train", "val", "test"):
        key, index = Key(0, "x"), torch.arange(600)
        a, b = (d.fetch(split, d.draw(split, key, index, torch.zeros_like(index))) for d in (noisy, clean))
        for name in ("support", "query"):
            x, y = getattr(a, name), getattr(b, name)
            assert torch.equal(x.x, y.x)
            residual = (x.y - y.y).double().flatten().numpy()
            if split == "train" or name == "support":
                assert kstest(residual / 0.3, "norm").pvalue > 1e-3
            else:
                assert (residual == 0).all()


def test_a_family_is_a_choice_of_curves_alone():
    """The points of a task are the same whatever the families; sizes are those asked for."""
    a, b = (training_tasks(GroupRegression(families=f, shot=3, queries=4), 50) for f in (FAMILIES, ("line",)))
    assert torch.equal(a.support.x, b.support.x) and torch.equal(a.query.x, b.query.x)
    assert a.support.x.shape == (50, 3, 1) and a.query.x.shape == (50, 4, 1)
    assert (b.latent["group"] == 0).all()
    dataset = GroupRegression(test_shot=4, test_queries=6)
    assert [p.x.shape[1] for p in frozen(dataset)[0].episodes[:2]] == [4, 6]
    assert dataset.groups == ("sine", "line", "quadratic") and dataset.outputs("train") == 1


# ---- appearances of characters -----------------------------------------------------------------------------------

INK = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
BLANK = np.zeros((1, 28, 28), np.uint8)


def test_blurred_is_scipys_filter_inverted():
    """Two passes of the 5-point binomial filter with zeros outside, rounded to the nearest level."""
    weights = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    expected = [255 - ndimage.convolve(p.astype(float), weights, mode="constant") for p in INK]
    np.testing.assert_allclose(appearances.blurred(INK), expected, rtol=0, atol=0.5)


def test_dilated_is_scipys():
    expected = [ndimage.grey_dilation(p, (3, 3), mode="constant") for p in INK]
    np.testing.assert_array_equal(appearances.dilated(INK), expected)


@pytest.mark.parametrize(("degrees", "zoom"), [(45, 0.9), (45, 1.0), (20, 1.3), (-70, 0.6)])
def test_turned_is_scipys_affine_map(degrees, zoom):
    """Within the rounding of coordinates to 1/256 pixel (of differences up to 255) and of the result."""
    (c, s), middle = (f(np.radians(degrees)) / zoom for f in (np.cos, np.sin)), 13.5
    matrix = np.array([[c, -s], [s, c]])  # (row, column) of the result to those of the original
    offset = middle - matrix @ [middle, middle]
    padded = np.pad(INK, ((0, 0), (1, 1), (1, 1))).astype(float)  # so that it fades to 0 within a pixel, as ours does
    expected = [ndimage.affine_transform(p, matrix, offset + 1, (28, 28), order=1, mode="constant") for p in padded]
    np.testing.assert_allclose(appearances.turned(INK, degrees, zoom), expected, rtol=0, atol=2.6)


def test_turned_by_quarters_is_exact_and_clockwise():
    for quarters in range(4):
        np.testing.assert_array_equal(appearances.turned(INK, 90 * quarters, 1), np.rot90(INK, -quarters, (1, 2)))


def test_an_outline_is_a_ring_around_the_ink():
    """A square of side 10 becomes the ring between it and the square of side 14, at 0.81 of its area."""
    square = BLANK.copy()
    square[:, 9:19, 9:19] = 255
    found = appearances.outlined(square)
    assert (found[:, 11:17, 11:17] == 0).all()
    assert found.sum() / 255 == pytest.approx(0.81 * (14**2 - 10**2), rel=0.06)  # of sampling
    assert (appearances.outlined(BLANK) == 0).all() and (appearances.blurred(BLANK) == 255).all()


def test_pictures_are_rendered_alone(monkeypatch):
    """Chunks do not matter, channels are apart, the source stays as it is."""
    pictures = np.stack([INK, INK[::-1]], 1)
    before = pictures.copy()
    whole = {name: appearances.render(name, pictures) for name in appearances.APPEARANCES}
    monkeypatch.setattr(appearances, "CHUNK", 3)
    for name, found in whole.items():
        np.testing.assert_array_equal(found, appearances.render(name, pictures))
        np.testing.assert_array_equal(found[:, 0], appearances.APPEARANCES[name](INK))
    np.testing.assert_array_equal(pictures, before)
    np.testing.assert_array_equal(whole["plain"], before)


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    """The plain set, for tests that only read it."""
    return Glyphs(way=5, shot=5, queries=3)


@pytest.fixture(scope="module")
def group_glyphs(glyphs) -> GroupGlyphs:
    """The same in three appearances."""
    return GroupGlyphs(way=5, shot=5, queries=3)


def episodes_of(dataset, split: str, count: int):
    index = torch.arange(count)
    return dataset.fetch(split, dataset.draw(split, Key(0, "evaluation"), index, torch.zeros_like(index)))


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_task_is_the_plain_sets_task_in_one_appearance(glyphs, group_glyphs, split, monkeypatch):
    """The same classes and pictures as the plain set, every one of them rendered in the task's group."""
    if split == "train":  # a part of a script is enough
        few = {"train": glyph_inventory.classes()["train"][:40]}
        monkeypatch.setattr(glyph_inventory, "classes", lambda: few)
    plain, found = (episodes_of(d, split, 30) for d in (glyphs, group_glyphs))
    assert torch.equal(plain.latent["class_ids"], found.latent["class_ids"])
    group = found.latent["group"]
    assert split == "train" or group.tolist() == [i % 3 for i in range(30)]
    for a, b in ((plain.support, found.support), (plain.query, found.query)):
        assert torch.equal(a.y, b.y)
        for i in range(30):
            picture = (a.x[i, :, 0] * 255).round().to(torch.uint8).numpy()
            expected = appearances.APPEARANCES[group_glyphs.groups[group[i]]](picture)
            assert torch.equal(b.x[i, :, 0], torch.from_numpy(expected).float() / 255)


def test_one_plain_group_is_the_plain_set(glyphs):
    alone = GroupGlyphs(way=5, shot=5, queries=3, groups=["plain"])
    a, b = (flat(frozen(d, "val")) for d in (glyphs, alone))
    assert all(int(e.pop("group")) == 0 for e in b) and same(a, b)


def test_groups_are_told_apart_by_brightness_alone(group_glyphs):
    """The nearest of the groups' mean intensities names the group of 97 % of the support sets of unseen scripts."""
    episode = episodes_of(group_glyphs, "val", 300)
    level, group = episode.support.x.flatten(1).mean(1), episode.latent["group"]
    means = torch.stack([level[group == g].mean() for g in range(3)])
    assert ((level[:, None] - means).abs().argmin(1) == group).float().mean() > 0.95


def test_every_group_has_all_classes_of_its_split(group_glyphs):
    """And none of another split."""
    episode = episodes_of(group_glyphs, "val", 900)
    names = group_glyphs.split("val").names
    for g in range(3):
        assert len(episode.latent["class_ids"][episode.latent["group"] == g].unique()) == len(names)
    assert {n.split()[1] for n in names} == {"GEORGIAN", "OLD", "COPTIC"}


def test_hashes_of_appearances(glyphs, group_glyphs, monkeypatch):
    """Another name than the plain set's, changed by the recipe and by the plain set, not by the groups chosen."""
    reference = group_glyphs.data_hash()
    assert len(reference) == 16 and reference != glyphs.data_hash()
    assert GroupGlyphs(way=2, shot=1, queries=1, groups=["plain"]).data_hash() == reference
    hashes = {reference, GroupGlyphs(way=5, shot=1, queries=1, seed=1).data_hash()}
    monkeypatch.setattr(appearances, "RECIPE", "appearances-0")
    assert len(hashes | {group_glyphs.data_hash()}) == 3


def test_group_omniglot(tmp_path, monkeypatch):
    """Omniglot's characters and splits; dark ink is refused."""
    tiny_omniglot.pretend(monkeypatch)
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(omniglot_files, "split_list", LISTS.get)
    sizes = {"way": 2, "shot": 1, "queries": 2, "root": tiny_omniglot.archives(tmp_path / "data"), "checksum": "off"}
    plain, found = Omniglot(**sizes), GroupOmniglot(**sizes, groups=["outlined", "blurred"])
    a, b = plain.split("train"), found.split("train")
    assert a.names == b.names and len(b.images) == 2 * len(a.images) == 2 * 20 * len(a.names)
    for i, name in enumerate(("outlined", "blurred")):
        expected = appearances.APPEARANCES[name](a.images[:, 0].numpy())
        np.testing.assert_array_equal(b.images[i * len(a.images) : (i + 1) * len(a.images), 0].numpy(), expected)
    with pytest.raises(ValueError, match=r"dataset.invert = false: must be true"):
        GroupOmniglot(**sizes, invert=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dataset=group_glyphs dataset.groups=[]", r"dataset.groups=\[\]: must name at least one appearance, and none"),
        ("dataset=group_glyphs dataset.groups=[plain,plain]", r"dataset.groups=\[plain,plain\]: .* none twice"),
        ("dataset=group_glyphs dataset.groups=[plain,blured]", "must be one of plain, .*; did you mean 'blurred'"),
        ("dataset=group_omniglot dataset.root=x dataset.invert=false", "dataset.invert=false: must be true"),
        ("dataset=group_regression dataset.families=[]", "must name at least one family"),
        ("dataset=group_regression dataset.families=[line,lines]", "one of sine, .*; did you mean 'line'"),
        ("dataset=group_regression dataset.noise_std=-1", "dataset.noise_std=-1: must be >= 0"),
    ],
)
def test_bad_groups_are_refused(arguments, message):
    with pytest.raises(BadInput, match=message):
        expand(arguments.split(), to_run=False)


# ---- what results say of groups ----------------------------------------------------------------------------------


def test_results_are_split_by_group(tmp_path):
    """Parquet names the group of each episode, metrics are means over its rows, the table shows them."""
    cell = cell_of(tmp_path, "dataset=group_regression", "trainer.max_steps=3", "trainer.val_every=0",
                   "algorithm.test_steps=2", "trainer.test_episodes=11", "trainer.compile=never")  # fmt: skip
    assert run(cell) == "done"
    rows, found = pd.read_parquet(folder(tmp_path, cell) / "episodes.parquet"), result(tmp_path, cell)
    names = ["sine", "line", "quadratic"]
    assert (rows["group"] == [names[i % 3] for i in rows["episode"]]).all() and len(rows) == 33
    assert set(found["metrics"]) == {"mse", "mse@step=0", "mse@step=1", *(f"mse@group={name}" for name in names)}
    last = rows[rows["step"] == 2]
    for name, n in zip(names, (4, 4, 3), strict=True):
        entry, own = found["metrics"][f"mse@group={name}"], last[last["group"] == name]["value"]
        assert entry["n"] == len(own) == n and entry["mean"] == pytest.approx(own.mean(), rel=1e-12)
    shown = [line.split() for line in table(found, CellDir("there", "cell")).splitlines()]
    header = next(i for i, line in enumerate(shown) if line[:1] == ["metric"])
    assert [line[-1] for line in shown[header : header + 7]] == ["group", "all", "all", "all", *sorted(names)]


def test_results_without_groups_show_none(tmp_path):
    cell = cell_of(tmp_path, "trainer.max_steps=1", "trainer.val_every=0", "algorithm.test_steps=1")
    run(cell)
    assert pd.read_parquet(folder(tmp_path, cell) / "episodes.parquet")["group"].isna().all()
    shown = table(result(tmp_path, cell), CellDir("there", "cell"))
    assert "step" in shown and "group" not in shown and "all" not in shown


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gathered_values_are_in_the_order_of_the_episodes(ranks, monkeypatch):
    """Each rank has every ranks-th episode in stacks of two; values keep their types."""
    values, groups = torch.arange(11.0), torch.arange(11) % 3

    def stacks(rank):
        parts = zip(values[rank::ranks].split(2), groups[rank::ranks].split(2), strict=True)
        return [{"a": (v, -v), "group": (g,)} for v, g in parts]

    def everyone(out, _):
        out[:] = [{k: tuple(map(torch.cat, zip(*(s[k] for s in stacks(r)), strict=True))) for k in ("a", "group")}
                  for r in range(ranks)]  # fmt: skip

    monkeypatch.setattr(training.dist, "all_gather_object", everyone)
    found = training.gather(stacks(0), ranks, 11)
    assert torch.equal(found["a"][0], values) and torch.equal(found["a"][1], -values)
    assert torch.equal(found["group"][0], groups) and found["group"][0].dtype == torch.int64
