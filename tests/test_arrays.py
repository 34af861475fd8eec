"""Arrays of one's own: which tasks are made of them, how they are divided, and what is refused before a run."""

import pickle
import subprocess
import sys
import zipfile

import numpy as np
import own_data
import pytest
import runs
import torch
from scipy.stats import chisquare

from metalearn.cells import expand
from metalearn.datasets import array_files
from metalearn.datasets.arrays import Arrays, ArraysRegression
from metalearn.datasets.partition import by_fractions
from metalearn.ops import native
from metalearn.random import Key
from metalearn.run import build_learner, run
from metalearn.schema import BadInput, member_of

SPLITS = ("train", "val", "test")
EPISODES = {"way": 2, "shot": 1, "queries": 2, "test_queries": 2}
SMALL = [f"dataset.{k}={v}" for k, v in EPISODES.items()]
QUARTERS = (0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def kernels():
    """Compiled where they are kept, before a test has a cache of its own."""
    native.reason()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(array_files, "_found", {})


def cell(root, *more, regression=False):
    kind = ["dataset=arrays_regression", "backbone=mlp", "dataset.shot=2", "dataset.queries=3"] if regression else []
    (found,) = expand([*(kind or ["dataset=arrays", "backbone=mlp", *SMALL]), f"dataset.root={root}", *more])
    return found


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def draw(dataset, split="train", tasks=200):
    drawn = dataset.draw(split, Key(0, "train"), torch.tensor(0), torch.arange(tasks))
    return drawn, dataset.fetch(split, drawn)


# ---- classification ----------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return own_data.classes(tmp_path / "x.npz", classes=12, count=4, shape=(3,))


def test_examples_are_those_of_their_classes(file):
    """Every class keeps all its rows, in the file's order, whatever the order of the classes in it."""
    dataset = Arrays(root=file, fractions=QUARTERS, **EPISODES)
    division = by_fractions([str(i) for i in range(12)], QUARTERS, 0)
    for split in SPLITS:
        found = dataset.split(split)
        assert list(found.names) == sorted(division[split], key=int)
        assert found.images.dtype == torch.float32 and found.images.shape == (4 * len(found.names), 3)
        for name, first in zip(found.names, found.first.tolist(), strict=True):
            expected = torch.tensor([int(name) + j / 100 for j in range(4)])[:, None].expand(4, 3)
            torch.testing.assert_close(found.images[first : first + 4], expected)
    drawn, episodes = draw(dataset)
    classes = torch.tensor([int(name) for name in dataset.split("train").names])[drawn["class_ids"]]
    for part, n in ((episodes.support, 1), (episodes.query, 2)):
        assert torch.equal(part.x[..., 0].floor().long(), classes.repeat_interleave(n, 1))
        assert part.y.tolist() == [[label for label in range(2) for _ in range(n)]] * 200


@pytest.mark.parametrize("kind", ["int64", "uint8", "U", "S", "bool"])
def test_labels_of_every_kind(tmp_path, kind):
    """Whole numbers and texts; the same names divide alike."""
    y = np.repeat(np.arange(2 if kind == "bool" else 12), 4)
    x = y[:, None] * np.ones(3)
    dataset = Arrays(root=save(tmp_path / "x.npz", x=x, y=y.astype(kind)), fractions=QUARTERS, **EPISODES)
    names = sum((list(found) for found in dataset.file.found.rows.values()), [])
    assert set(names) == ({"False", "True"} if kind == "bool" else {str(i) for i in range(12)})
    if kind != "bool":
        assert dataset.file.found.rows.keys() == set(SPLITS)
        assert {s: sorted(n) for s, n in dataset.file.found.rows.items()} == by_fractions(names, QUARTERS, 0)


@pytest.mark.parametrize(
    ("shape", "last", "expected"),
    [
        ((), False, (1,)),
        ((5,), False, (5,)),
        ((6, 7), False, (1, 6, 7)),
        ((3, 6, 7), False, (3, 6, 7)),
        ((6, 7, 3), True, (3, 6, 7)),
    ],
)
def test_inputs_of_every_shape(tmp_path, shape, last, expected):
    y = np.repeat(np.arange(12), 4)
    x = np.random.default_rng(0).normal(size=(48, *shape))
    root = save(tmp_path / "x.npz", x=x, y=y)
    dataset = Arrays(root=root, channels_last=last, **EPISODES)
    assert dataset.input_shape == expected
    name = dataset.split("test").names[0]
    rows = x[4 * int(name) : 4 * int(name) + 4].astype(np.float32)
    if last:
        rows = rows.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(dataset.split("test").images[:4].numpy(), rows.reshape(4, *expected))
    section = cell(root, f"dataset.channels_last={str(last).lower()}").config["dataset"]
    assert member_of("dataset", section).side(section) == (min(expected[1:]) if len(expected) == 3 else None)


def test_bytes_are_divided_by_255_and_nothing_else_is(tmp_path):
    y = np.repeat(np.arange(12), 4)
    for dtype, scale in ((np.uint8, 255), (np.int64, 1), (np.float64, 1), (np.float16, 1)):
        x = (y[:, None] * np.ones(3)).astype(dtype)
        dataset = Arrays(root=save(tmp_path / f"{np.dtype(dtype)}.npz", x=x, y=y), **EPISODES)
        drawn, episodes = draw(dataset)
        classes = torch.tensor([float(name) for name in dataset.split("train").names])[drawn["class_ids"]]
        torch.testing.assert_close(episodes.support.x[..., 0], classes / scale)
        assert dataset.split("train").images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)


def test_pictures_of_several_channels_go_through_convolutions(kernels, tmp_path):
    """Height and width may differ; the smaller one bounds the depth."""
    root = own_data.classes(tmp_path / "x.npz", classes=12, count=4, shape=(3, 32, 20))
    found = cell(root, "backbone=conv4", "backbone.width=2")
    dataset = Arrays(root=root, **EPISODES)
    learner = build_learner(found.config, dataset)
    x = draw(dataset, tasks=2)[1].support.x
    assert learner.run_net(learner.network(learner.theta()), x, when="query").shape == (2, 2, 2)
    with pytest.raises(BadInput, match="backbone.blocks=5: must be <= 4 for pictures of 20x20"):
        cell(root, "backbone=conv4", "backbone.blocks=5")


# ---- division ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regression", [False, True])
def test_an_array_may_divide(tmp_path, regression):
    names = np.repeat(np.arange(12), 5)
    split = np.array(["train"] * 6 + ["valid"] * 3 + ["test"] * 3)[names]
    which = {"task": names, "y": np.ones(60)} if regression else {"y": names}
    root = save(tmp_path / "x.npz", x=np.ones((60, 2)), split=split, **which)
    found = cell(root, regression=regression)
    section = found.config["dataset"]
    said = member_of("dataset", section).versions(section)
    groups = "tasks" if regression else "classes"
    assert said["split"] == f"6/3/3 {groups} in train/val/test, as the array split says"
    dataset = (ArraysRegression if regression else Arrays)(
        root=root, shot=2, queries=3, **({} if regression else {"way": 2})
    )
    assert [dataset.split(s).names for s in SPLITS] == [
        ("0", "1", "2", "3", "4", "5"),
        ("6", "7", "8"),
        ("9", "10", "11"),
    ]
    assert dataset.data_hash() == found.data_hash


def test_the_hash_names_arrays_and_division(tmp_path, file):
    """Equal for another compression, place or further arrays; other for other numbers, seeds and fractions."""
    same = Arrays(root=file, **EPISODES).data_hash()
    with np.load(file) as loaded:
        arrays = dict(loaded)
    np.savez_compressed(tmp_path / "other.npz", notes=np.arange(3), **arrays)
    assert Arrays(root=tmp_path / "other.npz", **EPISODES).data_hash() == same == cell(file).data_hash
    assert cell(tmp_path / "other.npz").cell_id == cell(file).cell_id
    others = [
        Arrays(root=file, seed=1, **EPISODES).data_hash(),
        Arrays(root=file, fractions=QUARTERS, **EPISODES).data_hash(),
        Arrays(root=save(tmp_path / "y.npz", x=arrays["x"], y=arrays["y"] + 1), **EPISODES).data_hash(),
        Arrays(root=save(tmp_path / "x2.npz", x=arrays["x"] + 1, y=arrays["y"]), **EPISODES).data_hash(),
    ]
    assert len({same, *others}) == 5 and len(same) == 16


def test_a_finished_run_needs_the_file_no_more(file):
    section = cell(file).config["dataset"]
    file.unlink()
    assert member_of("dataset", section).versions(section)["split"].startswith("8/2/2 classes")


# ---- regression --------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path):
    return own_data.lines(tmp_path / "lines.npz", tasks=12, count=7)


def test_support_and_queries_are_different_rows_of_one_task(lines):
    dataset = ArraysRegression(root=lines, fractions=QUARTERS, shot=2, queries=3, test_shot=4, test_queries=3)
    with np.load(lines) as loaded:
        rows = {(int(t), float(np.float32(x))) for t, x in zip(loaded["task"], loaded["x"][:, 0], strict=True)}
    for split, (shot, queries) in {"train": (2, 3), "val": (4, 3), "test": (4, 3)}.items():
        drawn, episodes = draw(dataset, split)
        slopes = torch.tensor([float(name) for name in dataset.split(split).names])[drawn["task_ids"]]
        assert torch.equal(episodes.latent["task_ids"], drawn["task_ids"])
        for part, n in ((episodes.support, shot), (episodes.query, queries)):
            assert part.x.shape == part.y.shape == (200, n, 1) and part.y.dtype == torch.float32
            torch.testing.assert_close(part.y, slopes[:, None, None] * part.x)
        x = torch.cat([episodes.support.x, episodes.query.x], 1)[..., 0]
        for slope, own in zip(slopes.tolist(), x.tolist(), strict=True):
            assert len(set(own)) == shot + queries  # support and query are disjoint
            assert {(int(slope), value) for value in own} <= rows


def test_tasks_and_rows_are_uniform(lines):
    """Every task equally often, and each of its rows in each place."""
    dataset = ArraysRegression(root=lines, fractions=QUARTERS, shot=1, queries=1)
    drawn, episodes = draw(dataset, tasks=4200)
    assert chisquare(torch.bincount(drawn["task_ids"]).numpy()).pvalue > 1e-3
    for place in range(2):
        counts = torch.bincount(drawn["rows"][:, place], minlength=42)
        assert len(counts) == 42 and chisquare(counts.numpy()).pvalue > 1e-3


def test_tasks_of_different_sizes_and_several_targets(tmp_path):
    sizes = np.arange(5, 17)
    task = np.random.default_rng(0).permutation(np.repeat([f"t{i}" for i in range(12)], sizes))
    x = np.random.default_rng(1).normal(size=(len(task), 2, 2))
    root = save(tmp_path / "x.npz", x=x, y=np.stack([x[:, 0, 0], x[:, 1, 1]], 1), task=task)
    dataset = ArraysRegression(root=root, shot=2, queries=3)
    assert dataset.outputs("train") == 2 and dataset.input_shape == (1, 2, 2)
    found = dataset.split("train")
    assert found.sizes.tolist() == [int(sizes[int(name[1:])]) for name in found.names]
    episodes = draw(dataset)[1]
    assert torch.equal(
        episodes.query.y, torch.stack([episodes.query.x[:, :, 0, 0, 0], episodes.query.x[:, :, 0, 1, 1]], -1)
    )


@pytest.mark.parametrize("regression", [False, True])
def test_draws_are_those_of_one_at_a_time(file, lines, regression):
    dataset = ArraysRegression(root=lines) if regression else Arrays(root=file, **EPISODES)
    if regression:
        dataset = ArraysRegression(root=lines, shot=2, queries=3)
    key = Key(0, "train")
    block = dataset.draw("train", key, torch.arange(3)[:, None], torch.arange(4)[None])
    together = dataset.fetch("train", {k: v.flatten(0, 1) for k, v in block.items()})
    for step in range(3):
        for task in range(4):
            single = dataset.draw("train", key, torch.tensor([step]), torch.tensor([task]))
            assert all(torch.equal(block[k][step, task], single[k][0]) for k in block)
            alone = dataset.fetch("train", single)
            for one, many in zip((*alone.support, *alone.query), (*together.support, *together.query), strict=True):
                assert torch.equal(one[0], many[4 * step + task])


@pytest.mark.parametrize("regression", [False, True])
def test_a_run_on_arrays_of_ones_own(kernels, file, lines, tmp_path, regression):
    out, section = tmp_path / "out", cell(lines if regression else file, regression=regression).config["dataset"]
    keys = [f"dataset.{k}={v}" for k, v in section.items() if k in ("root", "way", "shot", "queries") and v is not None]
    keys += ["dataset.test_queries=2", "backbone.hidden=[5]", "trainer.max_steps=2", "trainer.val_every=1"]
    found = runs.cell_of(out, f"dataset={section['name']}", "backbone=mlp", *keys)
    assert run(found) == "done"
    result = runs.result(out, found)
    assert result["data_hash"] == found.data_hash and "8/2/2" in result["versions"]["split"]
    assert ("mse" if regression else "accuracy") in result["metrics"]


# ---- what is refused ---------------------------------------------------------------------------------------------

X, Y = np.ones((48, 3)), np.repeat(np.arange(12), 4)


def nan_at(row):
    x = X.copy()
    x[row, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("arrays", "more", "message"),
    [
        ({"x": X}, [], "has no array 'y', which classification needs; it holds x"),
        ({"y": Y, "z": Y}, [], "has no array 'x', which classification needs; it holds y, z"),
        ({"x": X[:-1], "y": Y}, [], "'y' has 48 rows and 'x' has 47; must be equally many"),
        ({"x": X, "y": Y, "split": np.array(["train"])}, [], "'split' has 1 rows and 'x' has 48; must be equally many"),
        ({"x": X, "y": Y[:, None]}, [], "'y' has the shape (48, 1); must have 1 to 1 dimensions, none of them empty"),
        ({"x": np.ones((48, 0)), "y": Y}, [], "'x' has the shape (48, 0); must have 1 to 4 dimensions"),
        ({"x": np.ones((48, 1, 1, 1, 1)), "y": Y}, [], "'x' has the shape (48, 1, 1, 1, 1); must have 1 to 4"),
        ({"x": np.array(1.0), "y": Y}, [], "'x' has the shape (); must have 1 to 4 dimensions"),
        ({"x": X, "y": Y.astype(float)}, [], "'y' is of type float64; must be whole numbers or texts"),
        ({"x": X.astype(str), "y": Y}, [], "'x' is of type <U32; must be real numbers"),
        ({"x": X.astype(complex), "y": Y}, [], "'x' is of type complex128; must be real numbers"),
        ({"x": X, "y": Y, "split": Y}, [], "'split' is of type int64; must be texts"),
        ({"x": X, "y": Y, "split": np.array(["training"] * 48)}, [],
         "'split' has the value 'training'; must be one of train, val, test"),
        ({"x": X, "y": Y, "split": np.array(["train"] * 47 + ["test"])}, [],
         "'split' puts class '11' in 'test' and in 'train'; must be one"),
        ({"x": nan_at(5), "y": Y}, [],
         "'x' has numbers that are not finite (in float32) in 1 rows, the first of them 5"),
        ({"x": X * 1e39, "y": Y}, [], "'x' has numbers that are not finite (in float32) in 48 rows, the first of"),
        ({"x": X, "y": Y, "split": np.array(["train"] * 48)}, [], "no classes for split 'val'"),
        ({"x": X, "y": Y}, ["dataset.way=3"], "way=3: must be <= 2, the classes of split 'val' (8/2/2 in train/val/"),
        ({"x": X, "y": Y}, ["dataset.queries=4"],
         "dataset.shot + dataset.queries = 5: must be <= 4, the examples of class '1' in split 'train' (8 "),
        ({"x": X, "y": Y}, ["dataset.fractions=[0.5,0.4,0.2]"], "dataset.fractions=[0.5,0.4,0.2]: must sum to 1"),
        ({"x": X, "y": Y}, ["backbone=conv4"], "backbone=conv4: needs pictures, and this data set has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_classified_is_refused_in_one_line(tmp_path, arrays, more, message):
    root = save(tmp_path / "x.npz", **arrays)
    with pytest.raises(BadInput) as error:
        cell(root, *more)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"task": None}, [], "has no array 'task', which regression needs; it holds x, y"),
        ({"task": Y.astype(float)}, [], "'task' is of type float64; must be whole numbers or texts"),
        ({"y": Y.astype(str)}, [], "'y' is of type <U21; must be real numbers"),
        ({"y": np.ones((48, 2, 2))}, [], "'y' has the shape (48, 2, 2); must have 1 to 2 dimensions"),
        ({"y": nan_at(7)[:, 1]}, [], "'y' has numbers that are not finite (in float32) in 1 rows, the first of them 7"),
        (
            {},
            [],
            "dataset.shot + dataset.queries = 5: must be <= 4, the examples of task '1' in split 'train' (8 tasks",
        ),
        ({"split": np.array(["train"] * 48)}, ["dataset.queries=2"], "no tasks for split 'val'"),
    ],
)
def test_what_is_no_regression_is_refused_in_one_line(tmp_path, changes, more, message):
    arrays = {"x": X, "y": np.ones(48), "task": Y} | changes
    root = save(tmp_path / "x.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(BadInput) as error:
        cell(root, *more, regression=True)
    assert message in str(error.value) and "\n" not in str(error.value)


class Harmful:
    """What unpickling would do."""

    def __reduce__(self):
        return (sys.exit, ())


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Neither object arrays nor a pickle under an array's name."""
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    objects = np.empty(48, object)
    objects[:] = Harmful()
    root = tmp_path / "x.npz"
    with zipfile.ZipFile(root, "w") as archive:
        for name, array in {"x": X, "y": objects}.items():
            with archive.open(f"{name}.npy", "w") as opened:
                np.lib.format.write_array(opened, array, allow_pickle=True)
    with pytest.raises(BadInput, match=r"'y' holds Python objects, which are never unpickled; save numbers, or texts"):
        cell(root)
    with zipfile.ZipFile(root, "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Harmful()))
        archive.writestr("y.npy", b"")
    with pytest.raises(BadInput, match="cannot read x.npy"):
        cell(root)


def test_what_is_no_npz_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="none.npz: no such file"):
        cell(tmp_path / "none.npz")
    with pytest.raises(BadInput, match="is not an .npz file; make one with numpy.savez"):
        cell(tmp_path)
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(BadInput, match="is not an .npz file; make one with numpy.savez"):
        cell(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(BadInput, match="has no array 'x', which classification needs; it holds no arrays"):
        cell(tmp_path / "x.zip")
    whole = save(tmp_path / "whole.npz", x=X, y=Y).read_bytes()
    (tmp_path / "broken.npz").write_bytes(whole[:200] + bytes(20) + whole[220:])
    with pytest.raises(BadInput, match="dataset.root=.*broken.npz: "):
        cell(tmp_path / "broken.npz")


def test_a_configuration_can_be_shown_without_the_file(tmp_path):
    (found,) = expand(["dataset=arrays", f"dataset.root={tmp_path / 'none.npz'}"], to_run=False)
    assert found.config["dataset"]["name"] == "arrays"
    (found,) = expand(["dataset=arrays_regression"], to_run=False)
    assert found.config["dataset"]["root"] == "???"


def test_checked_without_torch(file):
    code = (
        "import sys\nfrom metalearn.cells import expand\n"
        f"args = {['dataset=arrays', f'dataset.root={file}', 'backbone=mlp', *SMALL]!r}\n"
        "print(expand(args)[0].data_hash, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [cell(file).data_hash, "False"]
