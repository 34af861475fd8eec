import hashlib
import io
import os
import warnings
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metalearn.datasets import omniglot, omniglot_files
from metalearn.datasets.archives import Remote, checksum
from metalearn.datasets.omniglot import Omniglot, area, nearest, split_characters
from metalearn.datasets.omniglot_files import PARTS, Part, check, data_hash, split_list, verify_counts
from metalearn.random import Key

EPISODES = {"way": 2, "shot": 1, "queries": 2}
SPLITS = ("train", "val", "test")

ALPHABETS = {"images_background": {"Beta": 3, "Alpha": 2}, "images_evaluation": {"Gamma_(Old)": 2, "Delta": 1}}
LISTS = {
    "vinyals": {
        "train": {"Beta": [1, 3], "Gamma_(Old)": [2], "Alpha": [2]},
        "val": {"Alpha": [1]},
        "test": {"Beta": [2]},
    },
    "meta_dataset": {"train": ["Beta"], "val": ["Alpha"], "test": ["Delta", "Gamma_(Old)"]},
    "lake": {"background": {"Beta": 3, "Alpha": 2}, "evaluation": {"Gamma_(Old)": 2, "Delta": 1}},
}


def drawing(name: str) -> np.ndarray:
    """Ink of a picture `Alphabet/characterNN/MMMM_DD.png`, bool `[105, 105]`: a few boxes that depend on the name."""
    draw = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    ink = np.zeros((105, 105), bool)
    for _ in range(4):
        (y, x), (h, w) = draw.integers(0, 80, 2), draw.integers(2, 25, 2)
        ink[y : y + h, x : x + w] = True
    return ink


def png(ink: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(~ink).save(file, "png")
    return file.getvalue()


def pictures(part: str) -> dict[str, bytes]:
    """Member name -> PNG of all pictures of a part."""
    characters = [f"{a}/character{i:02d}" for a, n in ALPHABETS[part].items() for i in range(1, n + 1)]
    names = [f"{c}/{number:04d}_{d:02d}.png" for number, c in enumerate(characters, 1) for d in range(1, 21)]
    return {f"{part}/{name}": png(drawing(name)) for name in names}


@pytest.fixture(scope="session")
def contents():
    return {part: pictures(part) for part in ALPHABETS}


def pack(folder: Path, contents) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, members in contents.items():
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    return folder


def unpack(folder: Path, contents) -> Path:
    for members in contents.values():
        for name, data in members.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def root(tmp_path, contents):
    return pack(tmp_path / "data", contents)


@pytest.fixture
def parts(tmp_path, root):
    """What the small archives should hold, with their own checksums."""

    def part(name):
        path = root / f"{name}.zip"
        remote = Remote(
            f"http://127.0.0.1:9/{name}.zip", path.stat().st_size, *(checksum(path, k) for k in ("sha256", "md5"))
        )
        return Part(name, ALPHABETS[name], remote)

    return tuple(part(name) for name in ALPHABETS)


@pytest.fixture
def Small(parts, monkeypatch):
    monkeypatch.setattr(omniglot_files, "split_list", LISTS.get)

    class Small(Omniglot):
        def __init__(self, **options):
            super().__init__(**(EPISODES | options))

    Small.parts = parts
    return Small


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    if "data" not in request.keywords:
        monkeypatch.setenv("METALEARN_CACHE", str(tmp_path / "cache"))


def test_pictures_are_those_of_their_classes_in_order(Small, root):
    """Row 20 c + d is drawing d + 1 of the c-th character by name."""
    pictures = Small(root=root, rotations=False).split("train")
    assert pictures.names == ("Alpha/character02", "Beta/character01", "Beta/character03", "Gamma_(Old)/character02")
    assert pictures.first.tolist() == [0, 20, 40, 60] and pictures.sizes.tolist() == [20] * 4
    numbers = {"Alpha/character02": 5, "Beta/character01": 1, "Beta/character03": 3, "Gamma_(Old)/character02": 2}
    for name, first in zip(pictures.names, pictures.first, strict=True):
        ink = np.stack([drawing(f"{name}/{numbers[name]:04d}_{d:02d}.png") for d in range(1, 21)])
        np.testing.assert_array_equal(pictures.images[first : first + 20, 0].numpy(), area(ink, 28))
    assert pictures.images.dtype == torch.uint8


@pytest.mark.parametrize("place", ["trees", "nested trees", "archives in omniglot", "trees in omniglot", "mixed"])
def test_other_places_have_the_same_pictures_and_hash(Small, root, parts, contents, tmp_path, place):
    other = tmp_path / "other"
    if place == "archives in omniglot":
        pack(other / "omniglot", contents)
    elif place == "nested trees":
        for part in contents:
            unpack(other / part, {part: contents[part]})
    elif place == "mixed":
        pack(other, {"images_evaluation": contents["images_evaluation"]})
        unpack(other, {"images_background": contents["images_background"]})
    else:
        unpack(other / ("omniglot" if "in omniglot" in place else ""), contents)
    one, two = Small(root=root), Small(root=other, checksum="off")
    assert one.data_hash() == two.data_hash() == data_hash(other, parts)
    for split in ("train", "val", "test"):
        assert torch.equal(one.load(split).images, two.load(split).images)
        assert one.load(split).names == two.load(split).names


def test_hash_follows_the_contents_only(Small, root, parts, contents, tmp_path):
    tree = unpack(tmp_path / "tree", contents)
    before = data_hash(tree, parts)
    some = tree / "images_background/Beta/character02/0002_07.png"
    os.utime(some)
    (tree / "images_background" / "notes.txt").write_text("mine")
    assert data_hash(tree, parts) == before
    assert Small(root=root, resize="nearest", size=14, rotations=False, variant="lake").data_hash() == before
    some.write_bytes(png(np.zeros((105, 105), bool)))
    assert data_hash(tree, parts) != before


def test_decoded_once(Small, root, monkeypatch):
    first = Small(root=root).load("train")
    files = sorted(p.name for p in root.iterdir() if p.suffix in (".npy", ".json"))
    assert files == [f"omniglot_{data_hash(root, Small.parts)}{end}" for end in (".json", "_area28.npy")]
    monkeypatch.setattr(omniglot, "decode", None)
    again = Small(root=root, seed=3)
    assert torch.equal(again.load("train").images, first.images)
    assert isinstance(again._decoded()[0], np.memmap)
    assert again._decoded()[0].shape == (160, 1, 28, 28)


def test_a_read_only_folder_stays_as_it_is(Small, root, tmp_path):
    before = sorted(root.iterdir())
    root.chmod(0o555)
    Small(root=root).load("train")
    assert sorted(root.iterdir()) == before
    assert [p.suffix for p in sorted((tmp_path / "cache").glob("omniglot_*")) if p.suffix != ".lock"] == [
        ".json",
        ".npy",
    ]


@pytest.mark.parametrize(
    ("picture", "said"), [(Image.new("L", (105, 105)), "mode L"), (Image.new("1", (28, 28)), "28")]
)
def test_a_picture_of_another_format_is_refused(Small, root, contents, picture, said):
    file = io.BytesIO()
    picture.save(file, "png")
    changed = contents["images_background"] | {"images_background/Beta/character02/0002_07.png": file.getvalue()}
    pack(root, {"images_background": changed})
    with pytest.raises(ValueError, match=f"character02/0002_07.png has .*{said}"):
        Small(root=root, checksum="off").load("train")
    assert not list(root.glob("*.npy"))


def test_episodes(Small, root):
    data = Small(root=root, way=3, shot=2, queries=4)
    draw = data.draw("train", Key(0, "test"), torch.tensor(0), torch.arange(5))
    episode = data.fetch("train", draw)
    assert episode.support.x.shape == (5, 6, 1, 28, 28) and episode.query.x.shape == (5, 12, 1, 28, 28)
    assert episode.query.y[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert 0 <= float(episode.query.x.min()) and float(episode.query.x.max()) <= 1


def test_area_is_the_mean_over_the_target_pixel():
    """Oracle: enlarge 28 times by repetition, then average blocks of 105x105, exactly."""
    ink = np.stack([drawing("a"), drawing("b")])
    fine = ink.repeat(28, axis=1).repeat(28, axis=2).reshape(2, 28, 105, 28, 105)
    exact = fine.sum(axis=(2, 4), dtype=np.int64) * 255 / 105**2
    np.testing.assert_array_equal(area(ink, 28), np.floor(exact + 0.5))
    assert area(np.ones((1, 105, 105), bool), 28).min() == 255


@pytest.mark.parametrize("requested", ["NEAREST", "LANCZOS", "BICUBIC"])
def test_nearest_is_what_pillow_does_to_1_bit_pictures(requested):
    """MAML asks for Lanczos, Reptile for the default; on mode 1 they all get this."""
    ink = drawing("a")
    theirs = Image.fromarray(~ink).resize((28, 28), Image.Resampling[requested])
    np.testing.assert_array_equal(nearest(ink[None], 28)[0], 255 * ~np.asarray(theirs))


@pytest.mark.parametrize("resize", [area, nearest])
@pytest.mark.parametrize("size", [5, 14, 28, 30, 84, 105])
def test_turning_before_or_after_resizing_is_the_same(resize, size):
    """ProtoNet turns the large picture, we turn the small one."""
    ink = drawing("a")[None]
    for k in range(4):
        turned = resize(np.rot90(ink, k, (1, 2)), size)
        np.testing.assert_array_equal(turned, np.rot90(resize(ink, size), k, (1, 2)))


def test_full_size_is_the_picture_itself():
    ink = drawing("a")[None]
    np.testing.assert_array_equal(area(ink, 105), ink * np.uint8(255))
    np.testing.assert_array_equal(nearest(ink, 105), ink * np.uint8(255))


def test_nearest_is_black_and_white_and_area_is_grey(Small, root):
    assert Small(root=root, resize="nearest").load("train").images.unique().tolist() == [0, 255]
    assert len(Small(root=root, resize="area").load("train").images.unique()) > 20


@pytest.mark.parametrize("resize", ["area", "nearest"])
def test_invert_swaps_ink_and_paper(Small, root, resize):
    ink = Small(root=root, resize=resize).load("train").images
    paper = Small(root=root, resize=resize, invert=False).load("train").images
    assert torch.equal(paper, 255 - ink)
    assert ink.float().mean() < 128  # more paper than ink


def test_rotations_are_three_further_classes(Small, root):
    plain, turned = (Small(root=root, rotations=on).load("train") for on in (False, True))
    assert len(turned.names) == 4 * len(plain.names) and len(turned.images) == 4 * len(plain.images)
    assert turned.names[:5] == (
        *(f"Alpha/character02/rot{a}" for a in ("000", "090", "180", "270")),
        "Beta/character01/rot000",
    )
    assert list(turned.names) == sorted(turned.names)
    classes, originals = turned.images.unflatten(0, (-1, 4, 20)), plain.images.unflatten(0, (-1, 20))
    for k in range(4):
        assert torch.equal(classes[:, k], originals.rot90(k, (-2, -1)))
    assert turned.first.tolist() == list(range(0, 320, 20))


def test_size(Small, root):
    data = Small(root=root, size=14)
    assert data.load("val").images.shape == (80, 1, 14, 14) and data.input_shape == (1, 14, 14)


CHARACTERS = [c for part in PARTS for c in part.characters()]


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("vinyals", (1028, 172, 423)),
        ("meta_dataset", (883, 81, 659)),
        ("lake", (883, 81, 659)),
        ("random1200", (1100, 100, 423)),
    ],
)
def test_splits_cut_the_characters_into_disjoint_sets(variant, sizes):
    splits = split_characters(variant, CHARACTERS, 0)
    assert tuple(len(splits[s]) for s in SPLITS) == sizes
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == sorted(CHARACTERS)
    alphabets = [{c.partition("/")[0] for c in splits[s]} for s in SPLITS]
    shared = any(a & b for a, b in combinations(alphabets, 2))
    assert shared == (variant in ("vinyals", "random1200"))


def test_published_counts():
    assert [(p.name, len(p.alphabets), len(p.characters())) for p in PARTS] == [
        ("images_background", 30, 964),
        ("images_evaluation", 20, 659),
    ]
    assert len(set(CHARACTERS)) == 1623
    for name in ("lake", "vinyals", "meta_dataset"):
        assert {"repository", "commit", "path"} <= set(split_list(name)["source"])


def test_random1200_depends_on_the_seed_only():
    one = split_characters("random1200", CHARACTERS, 0)
    assert split_characters("random1200", CHARACTERS[::-1], 0) == one
    other = split_characters("random1200", CHARACTERS, 1)
    assert 900 > len(set(other["train"]) & set(one["train"])) > 600  # 1100^2 / 1623 = 746 by chance
    names = "\n".join(",".join(sorted(one[s])) for s in SPLITS)
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "385f1c242231a3f6"  # a change orphans results


def test_variants_reach_the_pictures(Small, root):
    for variant in ("meta_dataset", "lake"):
        data = Small(root=root, variant=variant, rotations=False)
        assert data.load("train").names == tuple(f"Beta/character{i:02d}" for i in (1, 2, 3))
        assert data.load("test").names == ("Delta/character01", "Gamma_(Old)/character01", "Gamma_(Old)/character02")


def test_missing_files_are_named_in_one_error(tmp_path):
    (tmp_path / "images_evaluation.zip").write_bytes(b"")
    for call in (lambda: check(tmp_path), lambda: data_hash(tmp_path), lambda: Omniglot(root=tmp_path, **EPISODES)):
        with pytest.raises(FileNotFoundError) as error:
            call()
        for part in PARTS:
            for said in (str(tmp_path / f"{part.name}.zip"), part.remote.url, str(part.remote.size)):
                assert said in str(error.value)
        for said in ("MIT", "dataset.root", "dataset.download=true", "there is a file of 0 bytes"):
            assert said in str(error.value)


def test_only_what_is_missing_is_named(root, parts):
    (root / "images_evaluation.zip").unlink()
    with pytest.raises(FileNotFoundError) as error:
        check(root, parts)
    assert "images_evaluation" in str(error.value) and "images_background" not in str(error.value)


def test_incomplete_archives_say_what_is_missing(Small, root, contents):
    members = dict(contents["images_background"])
    for name in contents["images_background"]:
        if "Alpha/character02" in name or name.endswith("Beta/character01/0001_20.png"):
            del members[name]
    pack(root, {"images_background": members})
    data = Small(root=root, checksum="off")
    said = r"holds 4 of the 5 characters of images_background; missing: Alpha/character02; .*: Beta/character01 \(19\)"
    for call in (data.data_hash, lambda: data.load("train")):
        with pytest.raises(ValueError, match=said):
            call()


def test_other_characters_are_not_expected(tmp_path):
    found = {
        Path("x.zip"): [f"{c}/0001_{d:02d}.png" for c in [*PARTS[0].characters(), "My/character01"] for d in range(20)]
    }
    with pytest.raises(ValueError, match="not expected: My/character01"):
        verify_counts(found, PARTS[:1])


def test_checksum_decides_about_archives_packed_anew(Small, root, contents):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Small(root=root, checksum="error")
        before = Small(root=root).data_hash()
    for part in contents:  # other order, hence another file
        pack(root, {part: dict(reversed(contents[part].items()))})
    with pytest.raises(
        ValueError, match=r"not the official .*images_background\.zip .*images_evaluation\.zip .*checksum=warn"
    ):
        Small(root=root, checksum="error")
    with pytest.warns(UserWarning, match="not the official") as caught:
        assert Small(root=root, checksum="warn").data_hash() == before
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    Small(root=root, checksum="off")  # warnings are errors here


def test_download_fetches_what_is_missing(Small, root, monkeypatch):
    asked = []
    kept = (root / "images_evaluation.zip").read_bytes()
    (root / "images_evaluation.zip").unlink()

    def download(url, target, **known):
        asked.append((url, known["size"], known["sha256"]))
        target.write_bytes(kept)

    monkeypatch.setattr(omniglot_files, "download", download)
    with pytest.raises(FileNotFoundError):
        Small(root=root)
    assert asked == []
    Small(root=root, download=True)
    assert asked == [Small.parts[1].remote[:3]]


@pytest.mark.parametrize("bad", [{"variant": "maml"}, {"resize": "lanczos"}, {"checksum": "on"}, {"size": 0}])
def test_values_out_of_range_are_refused(Small, root, bad):
    with pytest.raises(ValueError, match=f"dataset.{next(iter(bad))}"):
        Small(root=root, **bad)


def test_misspelt_keys_are_refused(Small, root):
    with pytest.raises(TypeError, match="rotation"):
        Small(root=root, rotation=True)


@pytest.fixture(scope="module")
def real_root(tmp_path_factory):
    if "METALEARN_DATA_OMNIGLOT" not in os.environ:
        pytest.skip("METALEARN_DATA_OMNIGLOT does not name a folder with the two archives")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METALEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["METALEARN_DATA_OMNIGLOT"])


@pytest.mark.data
@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("vinyals", (4112, 688, 1692)),
        ("meta_dataset", (3532, 324, 2636)),
        ("lake", (3532, 324, 2636)),
        ("random1200", (4400, 400, 1692)),
    ],
)
def test_real_counts(real_root, variant, sizes):
    data = Omniglot(root=real_root, variant=variant, checksum="off", **EPISODES)
    loaded = [data.load(split) for split in SPLITS]
    assert tuple(len(pictures.names) for pictures in loaded) == sizes
    assert [tuple(pictures.images.shape) for pictures in loaded] == [(20 * n, 1, 28, 28) for n in sizes]
    assert not any(set(a.names) & set(b.names) for a, b in combinations(loaded, 2))


@pytest.mark.data
def test_real_archive_and_tree_are_the_same(real_root, tmp_path):
    for part in PARTS:
        with zipfile.ZipFile(real_root / f"{part.name}.zip") as archive:
            archive.extractall(tmp_path)
    assert data_hash(tmp_path) == data_hash(real_root) == "bc91edd59fa85915"


@pytest.mark.data
def test_real_pictures(real_root):
    """8 % ink; drawings 3 and 19 of Braille/character01 are equal; one picture compared with its file."""
    data = Omniglot(root=real_root, variant="meta_dataset", rotations=False, checksum="off", **EPISODES)
    pictures = data.load("train")
    assert 0.07 < float(pictures.images.float().mean()) / 255 < 0.09
    braille = pictures.images[pictures.first[pictures.names.index("Braille/character01")] :][:20]
    assert torch.equal(braille[2], braille[18])
    with zipfile.ZipFile(real_root / "images_background.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith("Korean/character04/0646_09.png"))
        ink = ~np.asarray(Image.open(io.BytesIO(archive.read(name))))
    korean = pictures.images[pictures.first[pictures.names.index("Korean/character04")] + 8]
    np.testing.assert_array_equal(korean[0].numpy(), area(ink[None], 28)[0])


@pytest.mark.data
def test_real_small_archive_has_the_published_checksum(real_root):
    path = real_root / "images_background_small1.zip"
    remote = Remote("", 1_319_022, md5="e704a628b5459e08445c13499850abc4")
    assert checksum(path, "md5") == remote.md5
    assert remote.matches(path)


@pytest.mark.data
@pytest.mark.parametrize(("resize", "expected"), [("area", 0.439), ("nearest", 0.377)])
def test_real_prototypes_of_raw_pixels(real_root, resize, expected):
    """5-way 1-shot, 600 test episodes: far above chance (0.2), within 3 half-widths (0.007) of what was measured."""
    data = Omniglot(root=real_root, way=5, shot=1, queries=15, resize=resize, checksum="off")
    draw = data.draw("test", Key(0, "test"), torch.tensor(0), torch.arange(600))
    support, query = data.fetch("test", draw)[:2]
    nearest = torch.cdist(query.x.flatten(2), support.x.flatten(2)).argmin(-1)
    assert abs(float((nearest == query.y).float().mean()) - expected) < 0.021
