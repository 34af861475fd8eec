"""Pictures in class folders: what is found, how it is divided and decoded, and what is refused before a run."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from metalearn.cells import expand
from metalearn.datasets import folder_files
from metalearn.datasets.folder import Folder
from metalearn.datasets.folder_files import pixels
from metalearn.datasets.partition import by_fractions
from metalearn.ops import native
from metalearn.random import Key
from metalearn.run import run
from metalearn.schema import BadInput, member_of

SPLITS = ("train", "val", "test")
CLASSES = [f"class{i:02d}" for i in range(12)]
SMALL = ["dataset.shot=1", "dataset.queries=2", "dataset.test_queries=2", "dataset.way=2", "dataset.size=8"]
THIRDS = "dataset.fractions=[0.5,0.25,0.25]"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_files, "_found", {})


@pytest.fixture(scope="module")
def kernels():
    """Compiled where they are kept, before a test has a cache of its own."""
    native.reason()


def picture(value, side=8, kind="png", mode="RGB") -> bytes:
    """One colour, lossless or nearly so; `value` is a number, or one a channel."""
    colour = (value,) * len(mode) if isinstance(value, int) and len(mode) > 1 else value
    file = io.BytesIO()
    options = {"quality": 100} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    Image.new(mode, (side, side), colour).save(file, kind, **options)
    return file.getvalue()


def contents(classes=CLASSES, count=4, prefix="") -> dict[str, bytes]:
    """Path -> file: picture j of class i has brightness 10 i + j."""
    return {f"{prefix}{name}/{j}.png": picture(10 * i + j) for i, name in enumerate(classes) for j in range(count)}


def unpack(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def cell(root, *more):
    (found,) = expand(["dataset=folder", f"dataset.root={root}", *SMALL, *more])
    return found


def dataset(root, **more) -> Folder:
    return Folder(**{"root": root, "size": 8, "way": 2, "shot": 1, "queries": 2, "test_queries": 2} | more)


def brightness(pictures) -> dict[str, list[int]]:
    """Class -> the values of its pictures, in their order."""
    mean = pictures.images.float().mean((1, 2, 3)).round().long()
    rows = zip(pictures.names, pictures.first.tolist(), pictures.sizes.tolist(), strict=True)
    return {name: mean[first : first + size].tolist() for name, first, size in rows}


# ---- what is found -----------------------------------------------------------------------------------------------


def test_classes_are_cut_by_fractions_and_hold_their_pictures(tmp_path):
    root = unpack(tmp_path / "data", contents())
    found = dataset(root, fractions=(0.5, 0.25, 0.25))
    names = {split: found.split(split).names for split in SPLITS}
    assert [len(names[s]) for s in SPLITS] == [6, 3, 3]
    assert sorted(sum(names.values(), ())) == CLASSES
    assert {s: list(n) for s, n in names.items()} == by_fractions(CLASSES, (0.5, 0.25, 0.25), 0)
    for split in SPLITS:
        for name, values in brightness(found.split(split)).items():
            assert values == [10 * CLASSES.index(name) + j for j in range(4)]
    assert found.split("train").images.dtype == torch.uint8 and found.input_shape == (3, 8, 8)
    assert {s: dataset(root, seed=1).found.rows[s].keys() for s in SPLITS} != {s: set(n) for s, n in names.items()}


def test_episodes_come_from_the_right_classes(tmp_path):
    """Labels follow classes, and pictures are divided by 255."""
    found = dataset(unpack(tmp_path / "data", contents()))
    draw = found.draw("train", Key(0, "train"), torch.tensor(0), torch.arange(40))
    episodes = found.fetch("train", draw)
    names = found.split("train").names
    for part, n in ((episodes.support, 1), (episodes.query, 2)):
        assert part.x.shape == (40, 2 * n, 3, 8, 8)
        classes = (part.x.mean((2, 3, 4)) * 255).round().long().reshape(40, 2, n) // 10
        of_class = torch.tensor([CLASSES.index(name) for name in names])[draw["class_ids"]]
        assert (classes == of_class[..., None]).all()


@pytest.mark.parametrize("place", ["data.zip", "data.tar.gz", "nested.zip", "link", "noise"])
def test_other_packing_has_the_same_hash_and_pictures(tmp_path, place):
    root = unpack(tmp_path / "data", contents())
    junk = {"__MACOSX/x/._0.png": b"?", "x/.hidden.png": b"?", ".git/0.png": b"?", "readme.txt": b"text"}
    if place == "link":
        (tmp_path / "link").symlink_to(root)
    elif place == "noise":
        unpack(tmp_path / place, contents() | {f"class00/{name}": data for name, data in junk.items()} | junk)
    else:
        prefix = "top/deeper/" if place.startswith("nested") else ""
        pack(tmp_path / place, contents(prefix=prefix) | junk)
    one, two = dataset(root), dataset(tmp_path / place)
    assert one.data_hash() == two.data_hash() and len(one.data_hash()) == 16
    assert one.data_hash() == cell(tmp_path / place).data_hash == cell(root).data_hash
    for split in SPLITS:
        a, b = one.split(split), two.split(split)
        assert a.names == b.names and torch.equal(a.images, b.images)


def test_the_hash_names_pictures_and_division(tmp_path):
    root = unpack(tmp_path / "data", contents())
    hashes = {
        dataset(root).data_hash(),
        dataset(root, seed=1).data_hash(),
        dataset(root, fractions=(0.5, 0.25, 0.25)).data_hash(),
        dataset(unpack(tmp_path / "changed", contents() | {"class00/0.png": picture(255)})).data_hash(),
        dataset(unpack(tmp_path / "more", contents() | {"class00/x.png": picture(255)})).data_hash(),
    }
    assert len(hashes) == 5
    before, after = cell(root), cell(root, "dataset.seed=1")
    assert before.train_id != after.train_id
    said = versions(before)
    assert said["split"] == "8/2/2 classes in train/val/test, by dataset.fractions and dataset.seed=0"
    assert said["class_list_hash"] != versions(after)["class_list_hash"]


def versions(found) -> dict[str, str]:
    return member_of("dataset", found.config["dataset"]).versions(found.config["dataset"])


def test_a_finished_run_needs_the_folder_no_more(tmp_path):
    root = unpack(tmp_path / "data", contents())
    found = cell(root)
    root.rename(tmp_path / "moved")
    assert versions(found)["split"].startswith("8/2/2")


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "valid", "Test"), ("train", "validation", "test")]
)
def test_trees_of_splits_bring_their_division(tmp_path, names):
    files: dict[str, bytes] = {}
    for top, part in zip(names, (CLASSES[:6], CLASSES[6:9], CLASSES[9:]), strict=True):
        files |= contents(part, prefix=f"{top}/")
    found = dataset(unpack(tmp_path / "data", files))
    assert [found.split(s).names for s in SPLITS] == [tuple(CLASSES[:6]), tuple(CLASSES[6:9]), tuple(CLASSES[9:])]
    assert found.found.versions()["split"] == "6/3/3 classes in train/val/test, as the folders have it"
    again = dataset(tmp_path / "data", split="fractions")
    assert {s: list(again.split(s).names) for s in SPLITS} == by_fractions(CLASSES, (0.64, 0.16, 0.2), 0)


def test_splits_of_pictures_are_refused_or_merged(tmp_path):
    """The usual layout of supervised data sets: the same classes in train, val and test."""
    files: dict[str, bytes] = {}
    for top in SPLITS:
        files |= contents(prefix=f"{top}/", count=2)
    root = unpack(tmp_path / "data", files)
    with pytest.raises(BadInput, match=r"12 classes are in train/ and in val/ .*dataset.split=fractions divides"):
        cell(root)
    merged = dataset(root, split="fractions")
    assert set(sum((merged.split(s).names for s in SPLITS), ())) == set(CLASSES)
    for split in SPLITS:
        for name, values in brightness(merged.split(split)).items():
            assert values == [10 * CLASSES.index(name) + j for _ in range(3) for j in range(2)]


def test_nested_classes_are_named_by_their_path(tmp_path):
    files = contents([f"{a}/{b}" for a in "xyz" for b in ("one", "two", "three")]) | contents(["x", "w"])
    found = dataset(unpack(tmp_path / "data", files))
    names = set(sum((found.split(s).names for s in SPLITS), ()))
    assert names == {f"{a}/{b}" for a in "xyz" for b in ("one", "two", "three")} | {"x", "w"}


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_file_may_divide_the_classes(tmp_path, kind):
    root, file = unpack(tmp_path / "data", contents()), tmp_path / f"division.{kind}"
    lists = {"train": CLASSES[2:5], "val": CLASSES[7:9], "test": CLASSES[:2]}
    if kind == "json":
        file.write_text(json.dumps(lists))
    else:
        rows = [f"{name},{split},x" for split, names in lists.items() for name in names]
        file.write_text("\n".join(["class,split,note", *rows]))
    found = dataset(root, split_file=file)
    assert {s: list(found.split(s).names) for s in SPLITS} == {s: sorted(n) for s, n in lists.items()}
    given = cell(root, f"dataset.split_file={file}")
    assert given.data_hash == found.data_hash() != cell(root).data_hash
    copy = tmp_path / f"copy.{kind}"
    copy.write_bytes(file.read_bytes())
    assert cell(root, f"dataset.split_file={copy}").cell_id == given.cell_id  # a path names nothing


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '{"train": ["class99"]}', "no class 'class99' in the data; did you mean 'class0"),
        ("x.json", '{"train": ["class00"], "test": ["class00"]}', "class 'class00' is in 'train' and in 'test'"),
        ("x.json", '{"training": ["class00"]}', "no such split 'training'; must be one of train, val, test"),
        ("x.json", "{", "x.json: Expecting property name"),
        ("x.json", "[1]", r'must hold \{"train"'),
        ("x.csv", "name,part\nclass00,train", "must name the columns class and split"),
        ("x.csv", "class,split\nclass00", "no such split ''"),
        ("x.json", '{"train": ["class00"], "val": [], "test": []}', "way=2: must be <= 1, the classes of split"),
    ],
)  # fmt: skip
def test_bad_divisions_are_refused(tmp_path, name, text, message):
    root = unpack(tmp_path / "data", contents())
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        cell(root, f"dataset.split_file={tmp_path / name}")
    with pytest.raises(BadInput, match="no such file"):
        cell(root, f"dataset.split_file={tmp_path / 'none.json'}")


# ---- division by fractions ---------------------------------------------------------------------------------------


def test_fractions_divide_names_and_nothing_else():
    """Disjoint, complete, of the right sizes, the same for any order of the names, other for another seed."""
    for n in (0, 1, 2, 5, 100, 333):
        names = [f"n{i}" for i in range(n)]
        found = by_fractions(reversed(names), (0.64, 0.16, 0.2), 3)
        assert found == by_fractions(names, (0.64, 0.16, 0.2), 3)
        assert sorted(sum(found.values(), [])) == sorted(names)
        assert all(abs(len(found[s]) - f * n) <= 1 for s, f in zip(SPLITS, (0.64, 0.16, 0.2), strict=True))
    assert by_fractions(names, (0.64, 0.16, 0.2), 4) != found
    assert by_fractions("ab", (0.5, 0.25, 0.25), 0) == by_fractions("ab", (0.5, 0.25, 0.25), 0)


def test_each_class_is_equally_likely_in_each_split():
    """Over seeds a class is in test with its fraction: 400 draws of 0.25 deviate by 0.022."""
    counts = dict.fromkeys(CLASSES, 0)
    for seed in range(400):
        for name in by_fractions(CLASSES, (0.5, 0.25, 0.25), seed)["test"]:
            counts[name] += 1
    assert all(abs(n / 400 - 0.25) < 0.1 for n in counts.values())


# ---- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tolerance"), [("png", 0), ("bmp", 0), ("webp", 0), ("jpeg", 2)])
def test_every_format_is_read(tmp_path, kind, tolerance):
    files = contents()
    files["class00/0.png"] = picture((200, 100, 50))
    other = {n if n != "class00/0.png" else f"class00/0.{kind.upper()}": d for n, d in files.items()}
    other[f"class00/0.{kind.upper()}"] = picture((200, 100, 50), kind=kind)
    found = dataset(unpack(tmp_path / "data", other))
    (split,) = (s for s in SPLITS if "class00" in found.split(s).names)
    pictures = found.split(split)
    row = int(pictures.first[pictures.names.index("class00")])
    expected = torch.tensor([200, 100, 50])[:, None, None]
    assert int((pictures.images[row].int() - expected).abs().max()) <= tolerance


def test_mixed_sizes_and_modes_become_one():
    """Grey, palette, one-bit, 16-bit and transparent pictures of any size; transparent is white."""
    wide = Image.new("RGB", (40, 20), (10, 20, 30))

    def of(picture, color="rgb", resize="stretch", **options):
        file = io.BytesIO()
        picture.save(file, "png", **options)
        return pixels(file.getvalue(), 8, color, resize)

    assert of(wide).shape == (3, 8, 8) and of(wide, "grey").shape == (1, 8, 8)
    assert of(wide)[:, 0, 0].tolist() == [10, 20, 30]
    luma = round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)
    assert (abs(of(wide, "grey").astype(int) - luma) <= 1).all()
    for mode in ("L", "P", "1"):
        assert (of(wide.convert(mode).convert("L").convert(mode)).std(0) == 0).all()
    assert (of(Image.new("1", (9, 9), 1), "grey") == 255).all()
    assert (of(Image.fromarray(np.full((9, 9), 51 * 257, np.uint16)), "grey") == 51).all()
    assert (of(Image.new("RGBA", (9, 9), (0, 0, 0, 0))) == 255).all()
    half = of(Image.new("RGBA", (9, 9), (0, 0, 0, 128)))
    assert (abs(half.astype(int) - 127) <= 1).all()
    assert (of(Image.new("LA", (9, 9), (0, 0)), "grey") == 255).all()


def test_stretched_and_cropped():
    """Left half black, right half white, twice as wide as high: stretched keeps both ends, cropped the middle."""
    array = np.zeros((8, 32, 3), np.uint8)
    array[:, 16:] = 255
    array[:, :8] = array[:, 24:] = 100
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    stretched, cropped = (pixels(file.getvalue(), 8, "rgb", how) for how in ("stretch", "crop"))
    assert stretched[0, 0, 0] == stretched[0, 0, -1] == 100
    assert cropped[0, 0].tolist() == [0, 0, 0, 0, 255, 255, 255, 255]
    np.testing.assert_array_equal(pixels(picture(7, 8), 8, "rgb", "crop"), np.full((3, 8, 8), 7))


def test_pictures_are_turned_as_the_camera_noted():
    array = np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6  # the camera was turned: show the picture turned clockwise
    Image.fromarray(array).save(file, "png", exif=exif)
    turned = pixels(file.getvalue(), 8, "rgb", "stretch")
    np.testing.assert_array_equal(turned[0], np.rot90(array[..., 0], -1))


def test_inverted_is_the_complement(tmp_path):
    root = unpack(tmp_path / "data", contents())
    plain, inverted = dataset(root), dataset(root, invert=True)
    assert torch.equal(inverted.split("train").images, 255 - plain.split("train").images)
    assert inverted.data_hash() == plain.data_hash()
    assert cell(root, "dataset.invert=true").train_id != cell(root).train_id


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    """Sizes and colours have files of their own; a tree that cannot be written beside is cached elsewhere."""
    root, calls = unpack(tmp_path / "data" / "tree", contents()), []
    monkeypatch.setattr(folder_files, "pixels", lambda *a: calls.append(1) or pixels(*a))
    for _ in range(2):
        cell(root)
        dataset(root).split("train")
    assert len(calls) == 48
    assert len(list((tmp_path / "data").glob("folder_*_rgb8_stretch.npy"))) == 1
    cell(root, "dataset.size=9")
    cell(root, "dataset.color=grey")
    cell(root, "dataset.resize=crop")
    assert len(calls) == 4 * 48 and len(list((tmp_path / "data").glob("*.npy"))) == 4
    (tmp_path / "data").chmod(0o500)
    try:
        found = dataset(root, size=10).found
    finally:
        (tmp_path / "data").chmod(0o700)
    assert found.pictures.parent == tmp_path / "cache"


def test_many_pictures_are_announced(tmp_path, monkeypatch, capsys):
    root = unpack(tmp_path / "data", contents())
    monkeypatch.setattr(folder_files, "TOLD", 48)
    cell(root)
    assert capsys.readouterr().err == f"metalearn: decoding 48 pictures of {root}, once\n"
    cell(root)
    assert not capsys.readouterr().err


def test_a_run_on_pictures_of_ones_own(kernels, tmp_path):
    """Three channels through convolutions, from files to result.json."""
    root, out = unpack(tmp_path / "data", contents()), tmp_path / "out"
    size = ["dataset.size=16", "backbone=conv4_mini", "backbone.width=2", "trainer.max_steps=2"]
    found = runs.cell_of(out, "dataset=folder", f"dataset.root={root}", *SMALL, *size, "trainer.val_every=1")
    assert run(found) == "done"
    result = runs.result(out, found)
    assert result["data_hash"] == found.data_hash and result["versions"]["split"].startswith("8/2/2 classes")
    assert result["protocol"]["way"] == 2 and 0 <= result["metrics"]["accuracy"]["mean"] <= 1


# ---- what is refused ---------------------------------------------------------------------------------------------


def refused(tmp_path, files, *more) -> str:
    (tmp_path / "data").mkdir(exist_ok=True)
    root = unpack(tmp_path / "data", files)
    with pytest.raises(BadInput) as error:
        cell(root, *more)
    message = str(error.value)
    assert message.count("\n") < 3
    return message.replace(str(root), "ROOT")


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        ({}, [], "dataset.root=ROOT: holds no pictures (png, jpg, jpeg, webp, bmp) in class folders"),
        ({"a/readme.txt": b""}, [], "dataset.root=ROOT: holds no pictures"),
        (contents() | {"x.png": b""}, [], "dataset.root=ROOT: the picture x.png lies in no class folder"),
        ({"x.png": picture(1)}, [], "dataset.root=ROOT: the picture x.png lies in no class folder"),
        (contents(), ["dataset.way=5"],
         "dataset.way=5: must be <= 2, the classes of split 'val' (8/2/2 in train/val/test)"),
        (contents(), ["dataset.test_way=3", "algorithm=protonet"],
         "dataset.test_way=3: must be <= 2, the classes of split 'val'"),
        (contents(), ["dataset.queries=4"],
         "dataset.shot + dataset.queries = 5: must be <= 4, the pictures of class 'class00' in split 'train' (8 "
         "classes have too few); lower dataset.queries"),
        (contents() | contents(["lonely"], 2), [THIRDS],
         "dataset.shot + dataset.queries = 3: must be <= 2, the pictures of class 'lonely' in split 'train'; lower "
         "dataset.queries"),
        (contents() | {"class03/2.png": picture(1)[:50]}, [],
         "dataset.root=ROOT: cannot read the picture class03/2.png: "),
        (contents() | {"class03/2.png": b"text"}, [], "dataset.root=ROOT: cannot read the picture class03/2.png: "),
        (contents() | {"class03/2.png": b""}, [], "dataset.root=ROOT: cannot read the picture class03/2.png: "),
        (contents(prefix="train/") | contents(prefix="test/"), [],
         "dataset.root=ROOT: has no pictures in val/<class>/; dataset.split=fractions divides all classes anew"),
        (contents(prefix="train/"), [],
         "dataset.root=ROOT: has no pictures in val/<class>/; dataset.split=fractions divides all classes anew"),
        (contents(prefix="train/") | contents(["x"], prefix="extra/"), [],
         "dataset.root=ROOT: extra/x/0.png lies outside of train/<class>/, val/<class>/ and test/<class>/; move it, or "
         "say dataset.split=fractions (every folder with pictures is a class)"),
        (contents(), ["dataset.split=folders"],
         "dataset.split=folders: ROOT has no train/<class>/, val/<class>/ and test/<class>/"),
        (contents(), ["dataset.fractions=[0.5,0.5,0.5]"], "dataset.fractions=[0.5,0.5,0.5]: must sum to 1"),
        (contents(), ["dataset.split=folders", "dataset.split_file=x.json"],
         "dataset.split=folders: dataset.split_file divides the classes already; leave out one"),
        (contents(), ["backbone=conv4", "dataset.size=9", "backbone.blocks=4"],
         "backbone.blocks=4: must be <= 3 for pictures of 9x9 pixels"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, files, more, message):
    assert refused(tmp_path, files, *more).startswith(message)


def test_a_missing_or_broken_archive_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no archive or folder at"):
        cell(tmp_path / "none")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(BadInput, match="neither a folder nor a complete zip or tar archive"):
        cell(tmp_path / "x.zip")
    whole = pack(tmp_path / "whole.tar.gz", contents()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="cut.tar.gz .* is not a complete tar archive"):
        cell(tmp_path / "cut.tar.gz")
    root = unpack(tmp_path / "data", contents())
    (root / "class00" / "link.png").symlink_to(root / "class00" / "0.png")
    with pytest.raises(BadInput, match="link"):
        cell(root)


def test_a_picture_that_cannot_be_read_leaves_no_file(tmp_path):
    root = unpack(tmp_path / "data" / "tree", contents() | {"class03/2.png": b"text"})
    with pytest.raises(BadInput):
        cell(root)
    assert not list((tmp_path / "data").glob("*.npy"))
    (root / "class03" / "2.png").write_bytes(picture(32))
    assert brightness(dataset(root).split("train")) | brightness(dataset(root).split("val"))


def test_checked_without_torch(tmp_path):
    """What a launch asks of the data set imports no torch."""
    root = unpack(tmp_path / "data", contents())
    code = (
        "import sys\nfrom metalearn.cells import expand\n"
        f"print(expand({['dataset=folder', f'dataset.root={root}', *SMALL]!r})[0].data_hash, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [cell(root).data_hash, "False"]
