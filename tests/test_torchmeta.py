"""torchmeta's data sets: pure in (split, key, step, task), with the laws of ours, and what is refused."""

import json
import random
import subprocess
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from scipy.stats import chisquare, ks_2samp, kstest
from test_data import episodes, flat, interleaved, same

from metalearn.cells import expand
from metalearn.datasets import torchmeta_package
from metalearn.datasets.harmonic import Harmonic
from metalearn.datasets.sinusoid import Sinusoid
from metalearn.datasets.torchmeta_adapter import (
    CURVES,
    TorchmetaClasses,
    TorchmetaCurves,
    TorchmetaRegression,
    TorchmetaTasks,
)
from metalearn.random import Key
from metalearn.run import build, build_learner, run
from metalearn.schema import BadInput

torchmeta_package.load()
from torchmeta.transforms import ClassSplitter, Rotation  # noqa: E402
from torchmeta.utils.data import ClassDataset, CombinationMetaDataset, Dataset, MetaDataset, Task  # noqa: E402

SPLITS = ("train", "val", "test")
each_curve = pytest.mark.parametrize("variant", CURVES)


def curves(variant="sinusoid", **more) -> TorchmetaCurves:
    return TorchmetaCurves(**{"variant": variant, "tasks": 1000, "shot": 5, "queries": 7} | more)


def draw(dataset, split="train", tasks=300, seed=0):
    drawn = dataset.draw(split, Key(seed, "train"), torch.tensor(0), torch.arange(tasks))
    return drawn, dataset.fetch(split, drawn)


def points(episodes) -> tuple[np.ndarray, np.ndarray]:
    """All inputs and targets of each task, `[B, n]`."""
    parts = [
        torch.cat([s, q], 1)[..., 0].double().numpy() for s, q in zip(episodes.support, episodes.query, strict=True)
    ]
    return parts[0], parts[1]


# ---- its curves --------------------------------------------------------------------------------------------------


def law(variant, table, x):
    """torchmeta's formulas, from its own tables."""
    if variant == "harmonic":
        w = table.frequencies[:, None]
        return sum(table.amplitudes[:, i, None] * np.sin((i + 1) * w * x + table.phases[:, i, None]) for i in range(2))
    sine = table.amplitudes[:, None] * np.sin(x - table.phases[:, None])
    if variant == "sinusoid":
        return sine
    return np.where(table.is_sinusoid[:, None], sine, table.slopes[:, None] * x + table.intercepts[:, None])


class Rows:
    """The rows of some tasks in a data set's tables."""

    def __init__(self, variant, source, rows):
        for name in CURVES[variant][1]:
            setattr(self, name, getattr(source, name)[rows])


@each_curve
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_curves_follow_the_laws_of_their_tables(variant, noise):
    """Residuals are rounding to float32, or N(0, 0.2) on every target."""
    dataset = curves(variant, noise_std=noise, test_shot=3, test_queries=4)
    for split in SPLITS:
        drawn, episodes = draw(dataset, split)
        shot, queries = (5, 7) if split == "train" else (3, 4)
        assert episodes.support.x.shape == (300, shot, 1) and episodes.query.y.shape == (300, queries, 1)
        assert episodes.support.x.dtype == episodes.query.y.dtype == torch.float32
        x, y = points(episodes)
        residual = y - law(variant, Rows(variant, dataset.source(split), drawn["task_ids"].numpy()), x)
        if noise:
            assert kstest(residual.flatten() / noise, "norm").pvalue > 1e-3
        else:
            assert abs(residual).max() < 1e-4


@pytest.mark.parametrize(
    ("variant", "ours"),
    [("sinusoid", Sinusoid(shot=5, queries=5)), ("harmonic", Harmonic(shot=5, queries=5, tasks=None, noise_std=0))],
    ids=["sinusoid", "harmonic"],
)
def test_ours_have_the_same_distribution(variant, ours):
    """Inputs, targets, and the task's largest target, from either source."""
    theirs = points(draw(curves(variant, tasks=100_000, queries=5), tasks=1000)[1])
    found = points(draw(ours, tasks=4000)[1])
    for a, b in zip(theirs, found, strict=True):
        for column in range(2):
            assert ks_2samp(a[:, column], b[:, column]).pvalue > 1e-3
        assert ks_2samp(abs(a).max(1), abs(b).max(1)).pvalue > 1e-3


@each_curve
def test_tables_are_the_data_sets_own(variant):
    """Those of torchmeta's class, seeded once: others for each split and dataset.seed, the same for every run."""
    tables = {(s, seed): curves(variant, seed=seed).source(s) for s in SPLITS for seed in (0, 1)}
    first = CURVES[variant][1][-1]
    assert len({getattr(t, first).tobytes() for t in tables.values()}) == 6
    assert np.array_equal(getattr(tables["train", 0], first), getattr(curves(variant).source("train"), first))
    assert len(curves(variant, tasks=17).source("val")) == 17
    assert len(curves(variant, tasks=None).source("val")) == (5000 if variant == "harmonic" else 1_000_000)


def test_tasks_are_drawn_evenly_and_points_afresh():
    drawn, episodes = draw(curves(tasks=20), tasks=1000)
    assert chisquare(torch.bincount(drawn["task_ids"]).numpy()).pvalue > 1e-3
    assert len(set(episodes.support.x[:, 0, 0].tolist())) > 990
    assert not torch.equal(draw(curves(tasks=20), seed=1)[0]["task_ids"], drawn["task_ids"][:300])


def test_lines_and_waves_are_told_apart():
    dataset = curves("sinusoid_and_line", queries=20)
    drawn, episodes = draw(dataset)
    assert dataset.groups == ("sinusoid", "line") and curves().groups == ()
    x, y = points(episodes)
    straight = np.array([abs(np.polyval(np.polyfit(a, b, 1), a) - b).max() < 1e-4 for a, b in zip(x, y, strict=True)])
    assert straight.tolist() == (episodes.latent["group"] == 1).tolist() and 100 < straight.sum() < 200


# ---- purity ------------------------------------------------------------------------------------------------------


@each_curve
def test_a_task_depends_on_its_coordinates_alone(variant):
    """Not on the tasks beside it, their order, or what was asked for before."""
    block = curves(variant).draw("train", Key(0, "train"), torch.arange(3)[:, None], torch.arange(4)[None])
    together = curves(variant).fetch("train", {k: v.flatten(0, 1) for k, v in block.items()})
    other = curves(variant)
    for step, task in [(s, t) for s in (2, 0, 1) for t in (3, 1, 0, 2)]:
        single = other.draw("train", Key(0, "train"), torch.tensor([step]), torch.tensor([task]))
        assert all(torch.equal(block[k][step, task], single[k][0]) for k in block)
        alone, i = other.fetch("train", single), 4 * step + task
        for one, many in zip((*alone.support, *alone.query), (*together.support, *together.query), strict=True):
            assert torch.equal(one[0], many[i])


@pytest.mark.parametrize("kind", range(6), ids=lambda i: [*CURVES, "regression", "tasks", "classes"][i])
def test_streams_are_the_same_for_any_block_rank_and_stack(kind, monkeypatch):
    """Training from any start and on any number of ranks; frozen episodes in any stack."""
    monkeypatch.setattr("metalearn.data.BLOCK", 8)
    whole = flat(list(episodes(everything()[kind]).training(0, 6)))
    frozen = flat(list(episodes(everything()[kind]).evaluation("val")))
    source = everything()[kind]
    assert same(flat(list(episodes(source).training(4, 6))), whole[16:])
    ranks = [flat(list(episodes(source).training(0, 6, rank, 2))) for rank in range(2)]
    assert same(interleaved(ranks), whole)
    monkeypatch.setattr("metalearn.data.BLOCK", 5)
    assert same(flat(list(episodes(source).training(1, 6))), whole[4:])
    for stack in (1, 4):
        assert same(flat(list(episodes(source, eval_batch=stack).evaluation("val"))), frozen)
    ranks = [flat(list(episodes(source).evaluation("val", rank, 3))) for rank in range(3)]
    assert same(interleaved(ranks), frozen)


PRINT = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_torchmeta as t
from metalearn.random import Key
order = torch.arange(6) if sys.argv[1] == "forwards" else torch.arange(5, -1, -1)
for dataset in t.everything():
    drawn = dataset.draw("val", Key(0, "x"), order, torch.zeros_like(order))
    parts = [dataset.fetch("val", {{k: v[i:i + 1] for k, v in drawn.items()}}) for i in range(6)]
    parts = parts if sys.argv[1] == "forwards" else parts[::-1]
    print([(p.support.x.sum().item(), p.query.y.sum().item(), p.support.y.tolist()) for p in parts])
"""


def everything() -> list:
    """One data set of each kind."""
    sizes = {"shot": 1, "queries": 2}
    own = {"factory": "test_torchmeta:lines", **sizes}, {"factory": "test_torchmeta:blobs", "way": 3, **sizes}
    classes = {"factory": "test_torchmeta:levels", "way": 2, "test_queries": 2, **sizes}
    return [*map(curves, CURVES), TorchmetaRegression(**own[0]), TorchmetaTasks(test_queries=2, **own[1]),
            TorchmetaClasses(**classes)]  # fmt: skip


@pytest.mark.slow
def test_another_process_finds_the_same_tasks():
    """In another order, and with another seed of Python's hashes."""
    code = PRINT.format(tests=str(Path(__file__).parent))
    found = [
        subprocess.run(
            [sys.executable, "-c", code, order],
            env={**__import__("os").environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for order, seed in (("forwards", "1"), ("backwards", "2"))
    ]
    assert found[0] == found[1] and len(found[0].splitlines()) == 6


def test_global_generators_are_left_alone():
    dataset = curves()
    drawn = draw(dataset, tasks=3)[0]

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    dataset.fetch("train", drawn)
    for made in everything()[3:]:
        draw(made, tasks=2)
    assert states() == before


# ---- data sets of somebody's own ---------------------------------------------------------------------------------


class LinesTask(Task):
    """y = (a x, -a x) for points that its own generator draws."""

    def __init__(self, index, slope, count, rng):
        super().__init__(index, None)
        self.x = rng.uniform(-1, 1, (count, 1))
        self.y = slope * self.x * np.array([1.0, -1.0])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Lines(MetaDataset):
    """Ten lines, of 3 to 12 points."""

    def __init__(self, meta_split, least=3):
        super().__init__(meta_split=meta_split)
        self.least, self._slopes = least, None

    @property
    def slopes(self):
        if self._slopes is None:
            self._slopes = self.np_random.normal(size=len(self))
        return self._slopes

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return LinesTask(index, self.slopes[index], self.least + index, self.np_random)


def lines(*, meta_split, shot, queries, **arguments):
    return Lines(meta_split, **arguments)


class BlobsTask(Task):
    """Four points a class around a centre of its own, in mixed order."""

    def __init__(self, index, ways, rng):
        super().__init__(index, ways)
        self.y = rng.permutation(np.repeat(np.arange(ways), 4)) + 10 * index
        self.x = self.y[:, None] + rng.uniform(0, 0.5, (len(self.y), 2))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return torch.from_numpy(self.x[i]), int(self.y[i])


class Blobs(MetaDataset):
    def __init__(self, meta_split, ways):
        super().__init__(meta_split=meta_split)
        self.ways = ways

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return BlobsTask(index, self.ways, self.np_random)


def blobs(*, meta_split, way, shot, queries):
    return Blobs(meta_split, way)


class Levels(ClassDataset):
    """Class i holds pictures of brightness 10 i, 10 i + 1, ..., as Pillow's, arrays or tensors."""

    def __init__(self, meta_split, classes=6, count=4, form="picture"):
        super().__init__(meta_split=meta_split)
        self.classes, self.count, self.form = classes, count, form

    @property
    def num_classes(self):
        return self.classes

    def __getitem__(self, index):
        return Level(index, self.count, self.form)


class Level(Dataset):
    def __init__(self, index, count, form):
        super().__init__(index)
        self.count, self.form = count, form

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        array = np.full((8, 6, 3), 10 * self.index + row, np.uint8)
        forms = {"picture": lambda: Image.fromarray(array), "bytes": lambda: array.transpose(2, 0, 1)}
        forms["grey"] = lambda: Image.fromarray(array[..., 0])
        forms["tensor"] = lambda: torch.from_numpy(array).permute(2, 0, 1).float() / 255
        forms["normal"] = lambda: torch.from_numpy(array).permute(2, 0, 1).float() / 100 - 0.3
        forms["noise"] = lambda: array.transpose(2, 0, 1) + np.random.normal(size=(3, 8, 6))
        return forms[self.form](), f"class {self.index}"


def levels(*, meta_split, way, shot, queries, **arguments):
    return CombinationMetaDataset(Levels(meta_split, **arguments), way)


def test_regression_tasks_of_ones_own():
    """Support and queries are different points of one task, whose table of slopes comes from dataset.seed."""
    dataset = TorchmetaRegression(factory="test_torchmeta:lines", shot=1, queries=2)
    assert dataset.input_shape == (1,) and dataset.outputs("train") == 2
    for split in SPLITS:
        drawn, episodes = draw(dataset, split, tasks=50)
        slopes = dataset.source(split).slopes[drawn["task_ids"].numpy()]
        for part, n in ((episodes.support, 1), (episodes.query, 2)):
            assert part.x.shape == (50, n, 1) and part.y.shape == (50, n, 2) and part.y.dtype == torch.float32
            expected = slopes[:, None, None] * part.x.double().numpy() * np.array([1, -1])
            np.testing.assert_allclose(part.y.double().numpy(), expected, atol=1e-6)
        x = torch.cat([episodes.support.x, episodes.query.x], 1)[..., 0]
        assert all(len(set(row)) == 3 for row in x.tolist())
    other = TorchmetaRegression(factory="test_torchmeta:lines", shot=1, queries=2, seed=1)
    assert not np.array_equal(other.source("train").slopes, dataset.source("train").slopes)
    assert not np.array_equal(dataset.source("val").slopes, dataset.source("train").slopes)


def test_classification_tasks_of_ones_own():
    """Every class has its label in support and query; labels are in random order."""
    dataset = TorchmetaTasks(factory="test_torchmeta:blobs", way=3, shot=1, queries=2, test_queries=3)
    assert dataset.input_shape == (2,) and dataset.outputs("test") == 3
    drawn, episodes = draw(dataset, "test", tasks=400)
    assert episodes.support.y.tolist() == [[0, 1, 2]] * 400
    assert episodes.query.y.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 400
    of_task = 10 * drawn["task_ids"][:, None]
    classes = [(part.x[..., 0].floor().long() - of_task) for part in (episodes.support, episodes.query)]
    assert torch.equal(classes[1], classes[0].repeat_interleave(3, 1))
    assert (classes[0].sort(1).values == torch.arange(3)).all()
    orders = torch.bincount((classes[0] * torch.tensor([9, 3, 1])).sum(1))
    assert chisquare(orders[orders > 0].numpy()).pvalue > 1e-3 and (orders > 0).sum() == 6
    x = torch.cat([episodes.support.x, episodes.query.x], 1)[..., 1]
    assert all(len(set(row)) == 12 for row in x.tolist())


@pytest.mark.parametrize("form", ["picture", "bytes", "tensor", "normal", "grey"])
def test_classes_of_ones_own(form):
    """Examples are those of their classes; what is a multiple of 1/255 is kept in 8 bits."""
    dataset = TorchmetaClasses(
        factory="test_torchmeta:levels", arguments={"form": form}, way=2, shot=1, queries=2, test_queries=2
    )
    shape = (1, 8, 6) if form == "grey" else (3, 8, 6)
    assert dataset.input_shape == shape
    assert dataset.split("train").images.dtype == (torch.float32 if form == "normal" else torch.uint8)
    drawn, episodes = draw(dataset, tasks=50)
    for part, n in ((episodes.support, 1), (episodes.query, 2)):
        assert part.x.shape == (50, 2 * n, *shape)
        value = part.x[:, :, 0, 0, 0]
        value = ((value + 0.3) * 100 if form == "normal" else value * 255).round().long()
        assert torch.equal(value // 10, drawn["class_ids"].repeat_interleave(n, 1))


def test_examples_that_are_drawn_at_random_are_drawn_once():
    made = [
        TorchmetaClasses(
            factory="test_torchmeta:levels",
            arguments={"form": "noise"},
            way=2,
            shot=1,
            queries=2,
            seed=seed,
            test_queries=2,
        )
        for seed in (0, 0, 1)
    ]
    first, again, other = (m.split("train").images for m in made)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_splitter_is_taken_off():
    dataset = TorchmetaRegression(factory="test_torchmeta:split_lines", shot=1, queries=2)
    plain = TorchmetaRegression(factory="test_torchmeta:lines", shot=1, queries=2)
    assert torch.equal(draw(dataset)[1].query.y, draw(plain)[1].query.y)


def split_lines(*, meta_split, shot, queries):
    return ClassSplitter(Lines(meta_split), num_train_per_class=shot, num_test_per_class=queries)


def omniglot(*, meta_split, way, shot, queries, root, rotations=True):
    """torchmeta's own helper, as in its examples."""
    from torchmeta.datasets.helpers import omniglot

    more = {} if rotations else {"class_augmentations": None}
    return omniglot(root, shots=shot, ways=way, test_shots=queries, meta_split=meta_split, **more)


@pytest.fixture
def hdf5(tmp_path, monkeypatch):
    """Omniglot as torchmeta stores it: six characters of a diagonal stroke, four drawings each."""
    import h5py

    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "root" / "omniglot").mkdir(parents=True)
    labels = [["images_background", "Alphabet", f"character{i:02d}"] for i in range(6)]
    with h5py.File(tmp_path / "root" / "omniglot" / "data.hdf5", "w") as file:
        for i, label in enumerate(labels):
            pictures = np.zeros((4, 105, 105), np.uint8)
            for d in range(4):
                pictures[d, 15 * i : 15 * i + 15, 20 * d : 20 * d + 40] = 255
            file["/".join(label)] = pictures
    for split in SPLITS:
        (tmp_path / "root" / "omniglot" / f"vinyals_{split}_labels.json").write_text(json.dumps(labels))
    return tmp_path / "root"


def test_omniglot_by_torchmetas_helper(hdf5):
    """Its pictures resized to 28x28 and turned by quarters, without torchvision."""
    import h5py

    sizes = {"way": 3, "shot": 1, "queries": 2, "test_queries": 2}
    dataset = TorchmetaClasses(factory="test_torchmeta:omniglot", root=str(hdf5), **sizes)
    pictures = dataset.split("train")
    assert pictures.images.shape == (6 * 4 * 4, 1, 28, 28) and len(pictures.names) == 24
    with h5py.File(hdf5 / "omniglot" / "data.hdf5") as file:
        array = file["images_background/Alphabet/character02"][1]
    small = np.asarray(Image.fromarray(array).resize((28, 28), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pictures.images[2 * 4 + 1, 0].numpy(), small)
    for quarter in range(1, 4):
        turned = np.asarray(Image.fromarray(np.rot90(array, quarter)).resize((28, 28), Image.Resampling.BILINEAR))
        found = pictures.images[(6 * quarter + 2) * 4 + 1, 0].numpy()
        assert abs(found.astype(int) - turned.astype(int)).max() <= 1
    plain = TorchmetaClasses(factory="test_torchmeta:omniglot", root=str(hdf5), arguments={"rotations": False}, **sizes)
    assert torch.equal(plain.split("train").images, pictures.images[:24])


def test_the_hash_names_version_function_and_root(hdf5, tmp_path):
    def found(*more):
        (cell,) = expand(["dataset=torchmeta_classes", "dataset.factory=test_torchmeta:omniglot", *more])
        return cell

    one = found(f"dataset.root={hdf5}")
    (tmp_path / "moved").mkdir()
    hdf5.rename(tmp_path / "moved" / "root")
    moved = found(f"dataset.root={tmp_path / 'moved' / 'root'}")
    assert one.cell_id == moved.cell_id and len(one.data_hash) == 16
    assert (
        found(f"dataset.root={tmp_path / 'moved' / 'root'}", "dataset.arguments.rotations=false").cell_id != one.cell_id
    )
    (tmp_path / "moved" / "root" / "omniglot" / "more.txt").write_text("x")
    assert found(f"dataset.root={tmp_path / 'moved' / 'root'}").data_hash != one.data_hash != found().data_hash
    with pytest.raises(BadInput, match="dataset.root=.*none: no archive or folder"):
        found(f"dataset.root={tmp_path / 'none'}")


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["dataset=torchmeta_sinusoid_and_line", "dataset.tasks=50", "backbone=mlp_sine"],
        ["dataset=torchmeta_classes", "dataset.factory=test_torchmeta:levels", "backbone=conv4", "backbone.blocks=2",
         "backbone.width=2", "dataset.way=2", "dataset.shot=1", "dataset.queries=2", "dataset.test_queries=2"],
    ],
    ids=["curves", "classes"],
)  # fmt: skip
def test_a_run(arguments, tmp_path):
    cell = runs.cell_of(tmp_path, *arguments, "trainer.max_steps=2", "trainer.val_every=1")
    assert run(cell) == "done"
    result = runs.result(tmp_path, cell)
    assert result["versions"]["torchmeta"] == "1.8.0" and result["data_hash"] == cell.data_hash
    curves = {"mse", "mse@group=line", "mse@group=sinusoid"}
    assert ({"accuracy"} if "dataset=torchmeta_classes" in arguments else curves) <= result["metrics"].keys()


def test_what_no_network_takes_is_refused(tmp_path):
    (cell,) = expand(
        ["dataset=torchmeta_tasks", "dataset.factory=test_torchmeta:blobs", "dataset.way=3", "backbone=conv4"]
    )
    dataset = build("dataset", cell.config["dataset"] | {"queries": 2, "test_queries": 2})
    with pytest.raises(BadInput, match=r"backbone=conv4: needs pictures, and examples have the shape \(2,\)"):
        build_learner(cell.config, dataset)


# ---- what is refused ---------------------------------------------------------------------------------------------


class Lazy(Lines):
    """Its table is made in part by the first task that is asked for."""

    slopes = None

    def __getitem__(self, index):
        if self.slopes is None:
            self.slopes = self.np_random.normal(size=10)
        return super().__getitem__(index)


class Entropy(Lines):
    """Draws from the machine's own entropy."""

    def __getitem__(self, index):
        return LinesTask(index, self.slopes[index], 5, np.random.RandomState(None))


def lazy(*, meta_split, **_):
    return Lazy(meta_split)


def entropy(*, meta_split, **_):
    return Entropy(meta_split)


def none(**_):
    return None


def other_transform(*, meta_split, **_):
    made = Lines(meta_split)
    made.dataset_transform = list
    return made


def fails(**_):
    raise OSError("no such disk")


class Empty(Lines):
    def __len__(self):
        return 0


def empty(*, meta_split, **_):
    return Empty(meta_split)


def other_way(*, meta_split, way, **_):
    return CombinationMetaDataset(Levels(meta_split), way + 1)


@pytest.mark.parametrize(
    ("cls", "factory", "arguments", "message"),
    [
        (TorchmetaRegression, "lazy", {}, "is another when asked for in another order; make tables of"),
        (TorchmetaRegression, "entropy", {}, "is another when asked for in another order"),
        (TorchmetaRegression, "none", {}, "must return a MetaDataset of torchmeta's, and returns NoneType"),
        (TorchmetaRegression, "fails", {}, r"called for split 'train' it raised OSError: no such disk \(.*py:"),
        (TorchmetaRegression, "empty", {}, "returns no tasks for split 'train'"),
        (TorchmetaRegression, "other_transform", {}, "must have no dataset_transform but ClassSplitter, and has type"),
        (TorchmetaRegression, "levels", {"way": 2}, "CombinationMetaDataset, which is for dataset=torchmeta_classes"),
        (TorchmetaRegression, "nothing", {}, "no 'nothing' in test_torchmeta"),
        (TorchmetaClasses, "lines", {}, "called for split 'train' it raised TypeError: .*'way'"),
        (TorchmetaClasses, "blobs", {}, "returns Blobs, which is for dataset=torchmeta_tasks or torchmeta_regression"),
        (TorchmetaTasks, "levels", {}, "returns CombinationMetaDataset, which is for dataset=torchmeta_classes"),
        (TorchmetaClasses, "other_way", {}, "has num_classes_per_task=3 for split 'train'; must be its way, 2"),
        (TorchmetaClasses, "levels", {"count": 2}, "has 6 classes of at least 2 examples in split 'train'; must"),
        (TorchmetaClasses, "levels", {"classes": 1}, "has 1 classes of at least 4 examples in split 'train'"),
        (TorchmetaClasses, "levels", {"form": "x"}, "reading class 0 of split 'train' raised KeyError: 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(cls, factory, arguments, message):
    sizes = {"shot": 1, "queries": 2} | ({} if cls is TorchmetaRegression else {"way": 2, "test_queries": 2})
    with pytest.raises(BadInput, match=f"^dataset.factory=test_torchmeta:{factory}: .*{message}") as error:
        cls(factory=f"test_torchmeta:{factory}", arguments=arguments, **sizes)
    assert "\n" not in str(error.value)


def test_tasks_that_are_too_small_are_refused():
    dataset = TorchmetaRegression(factory="test_torchmeta:lines", shot=2, queries=2)
    with pytest.raises(BadInput, match="has 3 examples; must have at least shot . queries = 4"):
        draw(dataset)
    dataset = TorchmetaTasks(factory="test_torchmeta:blobs", way=3, shot=2, queries=3)
    with pytest.raises(BadInput, match="has 3 classes of at least 4 examples; must have way = 3 classes of at least"):
        draw(dataset)
    with pytest.raises(BadInput, match="its tasks have classes; use dataset=torchmeta_tasks"):
        draw(TorchmetaRegression(factory="test_torchmeta:classified", shot=1, queries=2))


def classified(*, meta_split, **_):
    return Blobs(meta_split, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=torchmeta_regression"], "dataset.factory is required"),
        (["dataset=torchmeta_regression", "dataset.factory=x"], "dataset.factory=x: must be module:function"),
        (["dataset=torchmeta_tasks", "dataset.factory=no_such:x"], "dataset.factory=no_such:x: no module 'no_such'"),
        (["dataset=torchmeta_regression", "dataset.factory=test_torchmeta:lines", "dataset.arguments.shot=3"],
         r"dataset.arguments.shot=3: is given anyway; leave it out \(or set dataset.shot\)"),
        (["dataset=torchmeta_sinusoid", "dataset.variant=cosine"], "dataset.variant=cosine: must be one of sinusoid"),
        (["dataset=torchmeta_sinusoid"], "backbone=conv4_omniglot: needs pictures"),
    ],
)  # fmt: skip
def test_bad_keys_are_refused_before_torch(arguments, message):
    with pytest.raises(BadInput, match=message):
        expand([*arguments, *([] if message.startswith("backbone") else ["backbone=mlp"])])


@pytest.mark.parametrize("missing", [["torchmeta"], ["h5py", "ordered_set"]])
def test_without_torchmeta_one_line_says_what_to_do(missing, monkeypatch):
    there = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name in missing else there(name, *a))
    names = ("torchmeta_sinusoid", "torchmeta_regression")
    for name, more in zip(names, ([], ["dataset.factory=test_torchmeta:lines"]), strict=True):
        with pytest.raises(BadInput) as error:
            expand([f"dataset={name}", "backbone=mlp", *more])
        assert str(error.value).startswith(f"dataset={name}: needs the package")
        assert all(word in str(error.value) for word in (*missing, "pip install --no-deps torchmeta==1.8.0"))
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="needs the package"):
        curves().source("train")


def test_checked_without_torch():
    code = (
        "import sys\nfrom metalearn.cells import expand\n"
        "print(expand(['dataset=torchmeta_sinusoid', 'backbone=mlp'])[0].data_hash, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torchmeta", "1.8.0", "False"]


# ---- the package -------------------------------------------------------------------------------------------------


def test_nothing_else_depends_on_torchmeta():
    """Two files of the package know it, and nobody takes our stand-ins for torchvision."""
    package = Path(torchmeta_package.__file__).parents[1]
    using = {p.name for p in package.rglob("*.py") if "torchmeta." in p.read_text() and "schema" not in p.parts}
    assert using <= {"torchmeta_adapter.py", "torchmeta_package.py"}
    if util.find_spec("torchvision") is None:
        assert not [name for name in sys.modules if name.startswith("torchvision")]


@pytest.mark.slow
def test_a_module_of_ones_own_may_import_torchmeta_first(tmp_path):
    """In a fresh process, from a file beside which the command is given."""
    (tmp_path / "my_data.py").write_text(
        "from torchmeta.toy import Sinusoid\n\n\n"
        "def make(*, meta_split, shot, queries, tasks):\n    return Sinusoid(shot + queries, num_tasks=tasks)\n"
    )
    done = runs.console(
        tmp_path / "out", "dataset=torchmeta_regression", "dataset.factory=my_data:make", "dataset.arguments.tasks=9",
        "backbone=mlp_sine", "trainer.max_steps=1", "trainer.val_every=0", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mse" in done.stdout


def test_stand_ins_do_what_torchvision_does():
    """On pictures whose answers are known."""
    p = torchmeta_package
    array = np.arange(12, dtype=np.uint8).reshape(2, 6)
    picture = Image.fromarray(array)
    assert p.Compose([p.hflip, p.vflip])(picture).tobytes() == array[::-1, ::-1].tobytes()
    assert p.Resize(28)(Image.new("L", (105, 210))).size == (28, 56)
    assert p.Resize((5, 7))(picture).size == (7, 5)
    cropped = np.asarray(p.CenterCrop(2)(picture))
    np.testing.assert_array_equal(cropped, array[:, 2:4])
    assert torch.equal(p.ToTensor()(picture), torch.from_numpy(array)[None].float() / 255)
    assert p.ToTensor()(Image.new("RGB", (4, 5))).shape == (3, 5, 4)
    square = np.arange(9, dtype=np.uint8).reshape(3, 3)
    np.testing.assert_array_equal(np.asarray(p.rotate(Image.fromarray(square), 90, fill=(0,))), np.rot90(square))
    np.testing.assert_array_equal(np.asarray(Rotation(180)(Image.fromarray(square))), np.rot90(square, 2))


def test_files_by_stand_ins(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "c.txt").write_bytes(b"x")
    assert torchmeta_package.list_dir(tmp_path) == ["a", "b"]
    assert torchmeta_package.list_dir(tmp_path, prefix=True) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert torchmeta_package.check_integrity(tmp_path / "c.txt", "9dd4e461268c8034f5c8564e155c67a6")
    assert not torchmeta_package.check_integrity(tmp_path / "c.txt", "0" * 32)
    assert not torchmeta_package.check_integrity(tmp_path / "d.txt")
    with pytest.raises(RuntimeError, match="downloads need torchvision, which is not installed"):
        torchmeta_package.download_url("http://x", "y")
