import json
import os
import pickle
import threading
import warnings
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny_cifar as tiny
import torch
from runs import cell_of, result
from test_archives import Server

from metalearn.cells import expand
from metalearn.datasets import cifar_files, cifar_pictures
from metalearn.datasets.archives import checksum
from metalearn.datasets.cifar import CIFARFS, DEVIATION, FC100, MEAN
from metalearn.datasets.cifar_files import CLASSES, SUPERCLASS, SUPERCLASSES, check, classes_of, data_hash
from metalearn.random import Key
from metalearn.record import episodes_id
from metalearn.run import run
from metalearn.schema import BadInput, datasets

SETS = {"cifar_fs": CIFARFS, "fc100": FC100}
SPLITS = ("train", "val", "test")
EPISODES = {"way": 5, "shot": 1, "queries": 2}
OFFICIAL = "cifar-100-python.tar.gz"
CACHE = os.environ.get("METALEARN_CACHE")


@pytest.fixture(autouse=True)
def small(request, tmp_path, monkeypatch):
    if "data" not in request.keywords:
        monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
        tiny.pretend(monkeypatch)


@pytest.fixture
def root(tmp_path):
    return tiny.pack(tmp_path / "data", "FC100.zip")


def same_pictures(a, b) -> bool:
    """Equal as sets with repetition; an own comparison of bytes, not that of the package."""
    return Counter(x.tobytes() for x in np.asarray(a)) == Counter(x.tobytes() for x in np.asarray(b))


def episode(data, split="train", tasks=50, seed=0):
    return data.fetch(split, data.draw(split, Key(seed, "test"), torch.tensor(0), torch.arange(tasks)))


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay", [tiny.pack, tiny.unpack], ids=["archive", "tree"])
@pytest.mark.parametrize("archive", tiny.CONTENTS)
def test_every_container_has_the_same_pictures_and_hash(tmp_path, archive, lay):
    """Whatever their order, labels and format: episodes are equal, and the 600 (6) pictures are those of the class."""
    data = CIFARFS(root=lay(tmp_path / "data", archive), checksum="off", **EPISODES)
    assert data.data_hash() == cifar_files.content_of(tiny.digests())
    assert data_hash(lay(tmp_path / "deeper" / "cifar100", archive).parent) == data.data_hash()
    for split in SPLITS:
        pictures = data.split(split)
        assert pictures.names == tuple(classes_of("cifar_fs")[split])
        for name, x in zip(pictures.names, pictures.images.unflatten(0, (-1, 6)), strict=True):
            expected = tiny.pictures()[CLASSES.index(name)]
            assert same_pictures(x, expected)
            np.testing.assert_array_equal(x, cifar_pictures.canonical(expected[::-1])[0])


@pytest.mark.parametrize("archive", ["FC100.zip", "CIFAR-FS.zip", "cifar100_600.zip", OFFICIAL])
def test_root_may_be_the_tree_itself(tmp_path, archive):
    tiny.unpack(tmp_path, archive)
    root = tmp_path / tiny.FOLDER.get(archive, "cifar-100-python")
    (root / "another.bin").write_bytes(b"x")
    assert data_hash(root) == cifar_files.content_of(tiny.digests())
    assert cifar_files.pictures(root).parent == root


def test_hash_follows_the_pictures_only(tmp_path):
    tree = tiny.unpack(tmp_path, "cifar100.zip")
    before = data_hash(tree)
    some = tree / "cifar100/data/wolf/wolf_s_000003.png"
    os.utime(some, ns=(1, 1))
    some.rename(some.with_name("another.png"))
    assert data_hash(tree) == before
    x = tiny.pictures()[CLASSES.index("wolf"), 3].copy()
    x[2, 31, 31] ^= 1
    some.with_name("another.png").write_bytes(tiny.encoded(x.transpose(1, 2, 0), "png"))
    assert data_hash(tree) != before


def test_swapped_classes_have_another_hash(tmp_path):
    tree = tiny.unpack(tmp_path, "cifar100_600.zip")
    before, folder = data_hash(tree), tree / "cifar100_600"
    (folder / "wolf.webp").rename(folder / "x")
    (folder / "bear.webp").rename(folder / "wolf.webp")
    (folder / "x").rename(folder / "bear.webp")
    assert data_hash(tree) != before


def test_pictures_are_decoded_once(root, monkeypatch):
    value = data_hash(root)
    assert sorted(p.name for p in root.glob("*.npy")) == [f"cifar100_{value}.npy"]
    images = CIFARFS(root=root, checksum="off", **EPISODES).load("test").images
    monkeypatch.setattr(cifar_pictures, "decode", None)
    again = CIFARFS(root=root, seed=3, checksum="off", **EPISODES)
    assert torch.equal(again.load("test").images, images) and again.data_hash() == value


def test_a_lost_file_is_decoded_again(root):
    value = data_hash(root)
    (root / f"cifar100_{value}.npy").unlink()
    assert np.load(cifar_files.pictures(root)).shape == (100, 6, 3, 32, 32)


def test_a_read_only_folder_stays_as_it_is(root, tmp_path):
    before = sorted(root.iterdir())
    root.chmod(0o555)
    FC100(root=root, checksum="off", **EPISODES).load("val")
    root.chmod(0o755)
    assert sorted(root.iterdir()) == before
    assert len(list((tmp_path / "cache").glob("cifar100_*.npy"))) == 1


def test_missing_files_are_named_in_one_error(tmp_path):
    (tmp_path / OFFICIAL).write_bytes(b"<html>")
    for call in (lambda: check(tmp_path), lambda: data_hash(tmp_path), lambda: FC100(root=tmp_path, **EPISODES)):
        with pytest.raises(FileNotFoundError) as error:
            call()
        assert "\n" not in str(error.value)
        for said in (
            str(tmp_path / OFFICIAL),
            str(tmp_path / "cifar-100-python"),
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (169001437 bytes)",
            "Licence: none stated",
            "cifar100_600.zip, cifar100.zip or cifarfs.zip, FC100.zip",
            "dataset.root",
            "dataset.download=true",
            "there is a file of 6 bytes",
        ):
            assert said in str(error.value)


def without(members: dict[str, bytes], *parts: str) -> dict[str, bytes]:
    return {name: data for name, data in members.items() if not any(part in name for part in parts)}


def part(name: str, change) -> dict[str, bytes]:
    """The official files, with `train` or `test` changed."""
    content = tiny.part(*((0, 4, 1) if name == "train" else (4, 6, 2)))
    change(content)
    return tiny.official() | {f"cifar-100-python/{name}": tiny.python2(content)}


def fewer(content: dict) -> None:
    for key in ("data", "fine_labels", "coarse_labels"):
        content[key] = content[key][1:]


def other_coarse(content: dict) -> None:
    content["coarse_labels"][0] = (content["coarse_labels"][0] + 1) % 20


def labels(first: int) -> bytes:
    """FC100's training pickle whose labels begin elsewhere and whose pictures are no class."""
    x = np.zeros((360, 32, 32, 3), np.uint8)
    return tiny.python2({"data": x, "labels": (np.arange(360) // 6 + first).tolist()})


BROKEN = {
    "class": ("cifar100_600.zip", lambda: without(tiny.repacked(), "wolf.webp"), "holds 99 of the 100 .*missing: wolf"),
    "png": (
        "cifar100.zip",
        lambda: without(tiny.tree(), "wolf_s_000003"),
        r"without exactly 6 pictures: wolf \(5\)",
    ),
    "more": (
        "cifar100.zip",
        lambda: tiny.tree() | {"cifar100/data/cat/a.png": tiny.encoded(np.zeros((32, 32, 3), np.uint8), "png")},
        "not expected: cat",
    ),
    "part": (OFFICIAL, lambda: part("train", fewer), r"train holds 100 .*without exactly 4 pictures: \w+ \(3\)"),
    "member": (OFFICIAL, lambda: without(tiny.official(), "meta"), "holds no file 'meta'"),
    "coarse": (OFFICIAL, lambda: part("test", other_coarse), "test has classes with other superclasses"),
    "range": (OFFICIAL, lambda: part("test", lambda c: c["fine_labels"].__setitem__(3, 100)), "labels outside 0..99"),
    "length": (OFFICIAL, lambda: part("test", lambda c: c["fine_labels"].pop()), "another number of labels"),
    "float": (OFFICIAL, lambda: part("test", lambda c: c.update(data=c["data"] / 255)), "data is float64"),
    "no data": (OFFICIAL, lambda: part("test", lambda c: c.pop("data")), "test has no array 'data'"),
    "no labels": (OFFICIAL, lambda: part("test", lambda c: c.pop("fine_labels")), "fine_labels must be a list"),
    "names": (
        OFFICIAL,
        lambda: tiny.official() | {"cifar-100-python/meta": tiny.python2({"fine_label_names": ["cat"]})},
        "meta has other names",
    ),
    "small": (
        "cifar100.zip",
        lambda: (
            tiny.tree() | {"cifar100/data/wolf/wolf_s_000003.png": tiny.encoded(np.zeros((9, 9, 3), np.uint8), "png")}
        ),
        r"wolf_s_000003.png has \(9, 9\) pixels",
    ),
    "cut": (
        "cifar100.zip",
        lambda: (
            tiny.tree()
            | {"cifar100/data/wolf/wolf_s_000003.png": tiny.tree()["cifar100/data/wolf/wolf_s_000003.png"][:200]}
        ),
        "wolf_s_000003.png cannot be decoded",
    ),
    "split": (
        "cifar100.zip",
        lambda: tiny.tree() | {"cifar100/splits/bertinetto/val.txt": b"wolf\n"},
        r"val.txt is another split \(",
    ),
    "sheet": (
        "cifar100_600.zip",
        lambda: tiny.repacked() | {"wolf.webp": tiny.encoded(np.zeros((32, 192, 3), np.uint8), "webp")},
        r"wolf.webp has \(192, 32\) pixels",
    ),
    "index": ("cifar100_600.zip", lambda: tiny.repacked() | {"index.json": b"{}"}, "index.json is not complete"),
    "classes": (
        "cifar100_600.zip",
        lambda: (
            tiny.repacked()
            | {"index.json": json.dumps({"columns": 3, "per_class": 6, "coarse_of_fine": {"cat": "pets"}}).encode()}
        ),
        "index.json has other classes",
    ),
    "pickle": ("FC100.zip", lambda: without(tiny.CONTENTS["FC100.zip"](), "val"), "no file FC100_val.pickle"),
    "labels": (
        "FC100.zip",
        lambda: tiny.CONTENTS["FC100.zip"]() | {"FC100_train.pickle": labels(0)},
        "the 6 pictures of label 0 are none of these",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_and_other_files_are_refused(tmp_path, case):
    archive, members, said = BROKEN[case]
    root = tiny.pack(tmp_path, archive, members())
    with pytest.raises(ValueError, match=said):
        data_hash(root)
    assert not list(root.glob("*.npy"))


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_a_cut_archive_is_refused(tmp_path, keep):
    path = tiny.pack(tmp_path, OFFICIAL) / OFFICIAL
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises((ValueError, FileNotFoundError), match="not (a complete|an) "):
        data_hash(tmp_path)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [OFFICIAL, "FC100.zip"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, archive):
    name = {"FC100.zip": "FC100_val.pickle"}.get(archive, "cifar-100-python/test")
    evil = tiny.CONTENTS[archive]() | {name: pickle.dumps({"data": Evil(tmp_path / "evil")}, protocol=2)}
    with pytest.raises(ValueError, match=rf"{name} refers to (posix|nt)\.mkdir; refusing"):
        data_hash(tiny.pack(tmp_path, archive, evil))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("lay", [tiny.pack, tiny.unpack], ids=["archive", "tree"])
def test_checksum_decides_about_other_official_files(tmp_path, monkeypatch, lay):
    tiny.publish(monkeypatch, tiny.pack(tmp_path / "published", OFFICIAL) / OFFICIAL)
    root = tiny.unpack(tmp_path / "data", OFFICIAL) if lay is tiny.unpack else tmp_path / "published"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CIFARFS(root=root, checksum="error", **EPISODES)
    other = dict(reversed(tiny.official().items()))  # another archive
    other["cifar-100-python/test"] = tiny.python2(tiny.part(4, 6, 7))  # another order: another file, the same pictures
    root = lay(tmp_path / "other", OFFICIAL, other)
    with pytest.raises(ValueError, match=r"not the official CIFAR-100 .*md5 .*official .*checksum=warn"):
        CIFARFS(root=root, checksum="error", **EPISODES)
    with pytest.warns(UserWarning, match="not the official") as caught:
        data = CIFARFS(root=root, checksum="warn", **EPISODES)
    assert len(caught) == 1 and data.data_hash() == cifar_files.content_of(tiny.digests())
    CIFARFS(root=root, checksum="off", **EPISODES)


@pytest.mark.parametrize("archive", ["cifar100_600.zip", "cifar100.zip", "FC100.zip", "CIFAR-FS.zip"])
def test_checksum_decides_about_other_pictures(tmp_path, monkeypatch, archive):
    """Containers without published checksums are compared with the published pictures themselves."""
    root = tiny.pack(tmp_path, archive)
    FC100(root=root, checksum="error", **EPISODES)  # warnings are errors here
    monkeypatch.setattr(cifar_files, "DIGESTS", tiny.digests() | {"wolf": "0" * 16})
    with pytest.raises(ValueError, match="does not hold the pictures of CIFAR-100 as published"):
        FC100(root=root, checksum="error", **EPISODES)
    with pytest.warns(UserWarning, match="as published"):
        FC100(root=root, checksum="warn", **EPISODES)
    FC100(root=root, checksum="off", **EPISODES)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    archive = tiny.pack(tmp_path / "published", OFFICIAL) / OFFICIAL
    with Server() as server:
        server.body = archive.read_bytes()
        tiny.publish(monkeypatch, archive, server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_fetches_the_official_archive(server, tmp_path):
    with pytest.raises(FileNotFoundError):
        CIFARFS(root=tmp_path / "new", **EPISODES)
    assert server.requests == []
    data = CIFARFS(root=tmp_path / "new", download=True, checksum="error", **EPISODES)
    assert data.data_hash() == cifar_files.content_of(tiny.digests())
    assert checksum(tmp_path / "new" / OFFICIAL, "md5") == cifar_files.OFFICIAL_MD5
    CIFARFS(root=tmp_path / "new", download=True, **EPISODES)
    assert len(server.requests) == 1


def test_download_fetches_nothing_if_there_is_another_container(server, root):
    FC100(root=root, download=True, **EPISODES)
    assert server.requests == []


# ---- classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sizes"), [("cifar_fs", (64, 16, 20)), ("fc100", (60, 20, 20))])
def test_splits_cut_the_classes(name, sizes):
    lists = classes_of(name)
    assert tuple(len(lists[s]) for s in SPLITS) == sizes
    assert sorted(c for s in SPLITS for c in lists[s]) == list(CLASSES) and len(CLASSES) == 100
    shared = any(
        {SUPERCLASS[c] for c in lists[a]} & {SUPERCLASS[c] for c in lists[b]} for a, b in combinations(SPLITS, 2)
    )
    assert shared == (name == "cifar_fs")


def test_superclasses_have_five_classes_each():
    assert len(SUPERCLASSES) == 20 and set(Counter(SUPERCLASS.values()).values()) == {5}


@pytest.mark.parametrize(("schema", "name"), [(datasets.CIFARFS, "cifar_fs"), (datasets.FC100, "fc100")])
def test_the_schema_knows_the_sizes(schema, name):
    lists = classes_of(name)
    assert schema.classes == tuple(len(lists[s]) for s in SPLITS)
    assert schema.largest == tuple(max(Counter(SUPERCLASS[c] for c in lists[s]).values()) for s in SPLITS)
    assert schema.capacity({}) == {s: (len(lists[s]), 600) for s in SPLITS}


# ---- episodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", SPLITS)
def test_episodes(root, name, split):
    data = SETS[name](root=root, way=3, shot=2, queries=4)
    found = episode(data, split)
    assert found.support.x.shape == (50, 6, 3, 32, 32) and found.query.x.shape == (50, 12, 3, 32, 32)
    assert found.query.y[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert "group" not in found.latent and data.groups == ()
    for i, (classes, ids) in enumerate(zip(found.latent["class_ids"], found.latent["superclass_ids"], strict=True)):
        for slot, (c, superclass) in enumerate(zip(classes.tolist(), ids.tolist(), strict=True)):
            picked = data.split(split).names[c]
            assert SUPERCLASSES[superclass] == SUPERCLASS[picked]
            x = torch.cat([found.support.x[i, 2 * slot :][:2], found.query.x[i, 4 * slot :][:4]])
            assert same_pictures((x * 255).round().byte(), tiny.pictures()[CLASSES.index(picked)])


@pytest.mark.parametrize(
    ("name", "way", "groups"), [("fc100", 5, (12, 4, 4)), ("fc100", 2, (12, 4, 4)), ("cifar_fs", 2, (20, 5, 5))]
)
def test_superclasses_give_groups(root, name, way, groups):
    """Each task has one superclass; all with enough classes occur, equally often, with all their classes."""
    data = SETS[name](root=root, groups="superclass", way=way, shot=1, queries=1)
    assert data.groups == SUPERCLASSES
    for split, count in zip(SPLITS, groups, strict=True):
        draw = data.draw(split, Key(0, "test"), torch.tensor(0), torch.arange(3000))
        latent = data.fetch(split, {k: v[:20] for k, v in draw.items()}).latent
        assert latent["group"].dtype == torch.int64 and torch.equal(latent["group"], draw["superclass_ids"][:20, 0])
        assert (draw["superclass_ids"] == draw["superclass_ids"][:, :1]).all()
        assert all(len(set(row)) == way for row in draw["class_ids"].tolist())
        names, lists = data.split(split).names, Counter(SUPERCLASS[c] for c in classes_of(name)[split])
        enough = {s for s, n in lists.items() if n >= way}
        counts = Counter(SUPERCLASSES[i] for i in draw["superclass_ids"][:, 0].tolist())
        assert set(counts) == enough and len(enough) == count
        deviation = (3000 / count * (1 - 1 / count)) ** 0.5 if split == "train" else 0.0  # frozen tasks take turns
        assert max(abs(n - 3000 / count) for n in counts.values()) <= 4.5 * deviation
        assert {names[c] for c in draw["class_ids"].unique()} == {c for c in names if SUPERCLASS[c] in enough}


def test_groups_leave_other_tasks_as_they_are(root):
    """The key is off by default, and then draws nothing of its own."""
    key, at = Key(0, "test"), (torch.tensor(0), torch.arange(9))
    plain = FC100(root=root, **EPISODES).draw("train", key, *at)
    assert torch.equal(plain["class_ids"], key.sub("classes").choice(5, *at, size=60))


def test_a_superclass_needs_enough_classes(root):
    data = CIFARFS(root=root, groups="superclass", test_way=4, **EPISODES)
    data.draw("train", Key(0), torch.tensor(0), torch.arange(3))
    for split, most in (("val", 2), ("test", 3)):
        with pytest.raises(ValueError, match=f"dataset.test_way = 4 exceeds the {most} classes .* '{split}'"):
            data.draw(split, Key(0), torch.tensor(0), torch.arange(3))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"groups": "class"}, "dataset.groups"),
        ({"checksum": "on"}, "dataset.checksum"),
        ({"groups": "superclass", "label_assignment": "fixed_label"}, "dataset.groups"),
    ],
)
def test_values_out_of_range_are_refused(root, bad, said):
    with pytest.raises(ValueError, match=said):
        CIFARFS(root=root, **(EPISODES | bad))


@pytest.mark.parametrize(("options", "mirrored"), [({"flip": True}, ["train"]), ({"test_flip": True}, ["val", "test"])])
def test_support_pictures_are_mirrored(root, options, mirrored):
    """Each with probability 1/2, independently; queries, and everything else that is drawn, stay."""
    shape = {"way": 5, "shot": 2, "queries": 2}
    plain, data = FC100(root=root, **shape), FC100(root=root, **options, **shape)
    for split in SPLITS:
        before, after = episode(plain, split, 100), episode(data, split, 100)
        assert torch.equal(before.query.x, after.query.x)
        same = (before.support.x == after.support.x).flatten(2).all(-1)
        turned = (before.support.x.flip(-1) == after.support.x).flatten(2).all(-1)
        if split not in mirrored:
            assert same.all()
            continue
        assert (same ^ turned).all()
        assert abs(float(turned.float().mean()) - 0.5) < 4.5 * 0.5 / 1000**0.5
        counts = turned.sum(1).float()  # Binomial(10, 1/2): variance 2.5, deviation of its estimate about 0.34
        assert abs(float(counts.var()) - 2.5) < 1.5
        assert torch.equal(episode(data, split, 100).support.x, after.support.x)


def test_normalize(root):
    plain, data = (episode(FC100(root=root, normalize=on, **EPISODES)) for on in (False, True))
    mean, deviation = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, DEVIATION))
    for a, b in ((plain.support, data.support), (plain.query, data.query)):
        expected = (a.x.double() * 255 - mean) / deviation
        torch.testing.assert_close(b.x.double(), expected, rtol=0, atol=2e-6)  # float32 of numbers up to 2


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset=cifar_fs", "dataset.groups=superclass"], r"dataset.way=5: must be <= 2 .* split 'val'"),
        (
            ["dataset=cifar_fs", "dataset.groups=superclass", "dataset.test_way=3", "dataset.way=3"],
            r"dataset.test_way=3: must be <= 2 .* split 'val'",
        ),
        (["dataset=fc100", "dataset.groups=superclass", "dataset.way=6"], r"dataset.way=6: must be <= 5 .* 'train'"),
        (["dataset=fc100", "dataset.groups=superclass", "dataset.label_assignment=fixed_label"], "mutually_exclusive"),
        (["dataset=fc100", "dataset.groups=classes"], "none, superclass"),
        (["dataset=fc100", "dataset.test_way=21", "algorithm=protonet"], r"dataset.test_way=21: must be <= 20"),
        (["dataset=fc100", "dataset.queries=600"], r"must be <= 600, the pictures of a class"),
        (["dataset=fc100", "dataset.size=84"], "no such key"),
    ],
)
def test_bad_input_is_named(root, overrides, said):
    with pytest.raises(BadInput, match=said):
        expand([*overrides, f"dataset.root={root}"])


def test_missing_files_are_bad_input(tmp_path):
    for place in ("nowhere", "cut"):
        (tmp_path / place).mkdir()
    path = tiny.pack(tmp_path / "cut", OFFICIAL) / OFFICIAL
    path.write_bytes(path.read_bytes()[:-3000])
    for place, said in (("nowhere", "CIFAR-100 is not there"), ("cut", "not a complete tar archive")):
        with pytest.raises(BadInput, match=said):
            expand(["dataset=fc100", f"dataset.root={tmp_path / place}", "dataset.checksum=off"])


def test_frozen_episodes_are_named_by_what_changes_them(root):
    def name(*overrides):
        (cell,) = expand(["dataset=cifar_fs", "algorithm=maml", f"dataset.root={root}", *overrides])
        return episodes_id(cell)

    ids = [name(*more) for more in ([], ["dataset.test_flip=true"], ["dataset.normalize=true"], ["dataset.way=2"])]
    ids += [name("dataset.way=2", "dataset.groups=superclass")]
    assert len(set(ids)) == 5
    assert name("dataset.flip=true") == name("dataset.label_assignment=fixed_label") == ids[0]


@pytest.mark.parametrize("more", [["dataset=fc100", "dataset.groups=superclass"], ["dataset=cifar_fs"]])
def test_a_run(root, tmp_path, monkeypatch, more):
    if CACHE is None:  # where compiled kernels are
        monkeypatch.delenv("METALEARN_CACHE")
    else:
        monkeypatch.setenv("METALEARN_CACHE", CACHE)
    sizes = ["dataset.queries=1", "dataset.test_queries=3", "backbone=conv4_cifarfs", "backbone.width=4"]
    steps = ["trainer.max_steps=2", "trainer.val_every=2", "algorithm.inner_steps=1", "algorithm.test_steps=1"]
    cell = cell_of(tmp_path, *more, f"dataset.root={root}", *sizes, *steps)
    assert run(cell) == "done"
    found = result(tmp_path, cell)
    assert found["data_hash"] == cifar_files.content_of(tiny.digests())
    assert 0 <= found["metrics"]["accuracy"]["mean"] <= 1
    split = {name for name in found["metrics"] if name.startswith("accuracy@group=") and "," not in name}
    tested = {f"accuracy@group={SUPERCLASS[name]}" for name in classes_of("fc100")["test"]}
    assert split == (tested if "dataset.groups=superclass" in more else set())


# ---- the real pictures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_root(tmp_path_factory):
    if "METALEARN_DATA_CIFAR100" not in os.environ:
        pytest.skip("METALEARN_DATA_CIFAR100 does not name a folder with the pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["METALEARN_DATA_CIFAR100"])


@pytest.mark.data
@pytest.mark.parametrize(("name", "sizes"), [("cifar_fs", (64, 16, 20)), ("fc100", (60, 20, 20))])
def test_real_counts(real_root, name, sizes):
    data = SETS[name](root=real_root, checksum="error", **EPISODES)
    loaded = [data.load(split) for split in SPLITS]
    assert tuple(len(pictures.names) for pictures in loaded) == sizes
    assert [tuple(pictures.images.shape) for pictures in loaded] == [(600 * n, 3, 32, 32) for n in sizes]
    assert not any(set(a.names) & set(b.names) for a, b in combinations(loaded, 2))


@pytest.mark.data
def test_real_pictures_are_the_published_ones(real_root):
    """Means and deviations of the channels over all 60,000 pictures, as Lee et al. publish them to eight decimals."""
    assert data_hash(real_root) == "7c929d49a9ef52fe"
    images = np.load(cifar_files.pictures(real_root), mmap_mode="r")
    values = np.arange(256)
    for channel, mean, deviation in zip(range(3), MEAN, DEVIATION, strict=True):
        counts = np.bincount(images[:, :, channel].ravel(), minlength=256)
        found = (counts * values).sum() / counts.sum()
        assert abs(found - mean) < 5.1e-9
        assert abs((counts * (values - found) ** 2).sum() / counts.sum() - deviation**2) < 2e-6


@pytest.mark.data
@pytest.mark.parametrize(("name", "expected"), [("cifar_fs", 0.310), ("fc100", 0.279)])
def test_real_nearest_neighbours_of_raw_pixels(real_root, name, expected):
    """5-way 1-shot, 600 test episodes: above chance (0.2), within 3 half-widths (0.006) of what was measured."""
    data = SETS[name](root=real_root, way=5, shot=1, queries=15)
    support, query = episode(data, "test", 600)[:2]
    nearest = torch.cdist(query.x.flatten(2), support.x.flatten(2)).argmin(-1)
    assert abs(float((nearest == query.y).float().mean()) - expected) < 0.018
