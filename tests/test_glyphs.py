"""The glyphs set: its inventory, its drawings, its episodes and the hash that names them."""

import os
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont

import metalearn
from metalearn.cells import expand
from metalearn.datasets import glyph_inventory, glyphs
from metalearn.datasets.glyphs import Glyphs
from metalearn.random import Key
from metalearn.record import versions

SPLITS = ("train", "val", "test")
CLASSES_PER_SCRIPT = {  # as published with the recipe; a font or FreeType version may move a count by one
    **{"LATIN": 323, "CANADIAN": 337, "CYRILLIC": 142, "GREEK": 45},
    **{"GEORGIAN": 106, "OLD": 24, "COPTIC": 11},
    **{"ARABIC": 82, "ARMENIAN": 51, "HEBREW": 25, "NKO": 27, "LAO": 36, "OGHAM": 25, "TIFINAGH": 34, "LISU": 12},
}
SAMPLE = (0x0391, 0x1403, 0x2D63, 0x05D0, 0x0041)  # in no order, with 2 to 16 faces


@pytest.fixture(scope="module")
def dataset() -> Glyphs:
    """One set for the tests that only read it."""
    return Glyphs(way=5, shot=1, queries=15)


def make(**arguments: Any) -> Glyphs:
    """A set of 5-way 1-shot tasks."""
    return Glyphs(**{"way": 5, "shot": 1, "queries": 15, **arguments})


def test_letters_of_the_sixteen_faces():
    """4,141 letters, 1,818 without decomposition, 1,783 in 15 scripts."""
    codes = set().union(*glyph_inventory.charmaps().values())
    letters = {c for c in codes if unicodedata.category(chr(c)).startswith("L")}
    plain = {c for c in letters if unicodedata.normalize("NFKD", chr(c)) == chr(c)}
    assert (len(letters), len(plain), len(glyph_inventory.letters())) == (4141, 1818, 1783)
    assert set(glyph_inventory.letters()) <= plain
    assert {glyph_inventory.script(c) for c in glyph_inventory.letters()} == set(CLASSES_PER_SCRIPT)


def test_class_counts():
    """The published counts of the whole set, its splits and its scripts, within one."""
    classes = glyph_inventory.classes()
    counts = Counter(glyph_inventory.script(c) for codes in classes.values() for c in codes)
    assert counts.keys() == CLASSES_PER_SCRIPT.keys()
    assert all(abs(counts[script] - n) <= 1 for script, n in CLASSES_PER_SCRIPT.items())
    assert [len(classes[s]) for s in SPLITS] == [pytest.approx(n, abs=1) for n in (848, 141, 292)]
    assert counts.total() == pytest.approx(1281, abs=1)


def test_splits_share_no_script():
    """So validation and test alphabets are new."""
    scripts = [{glyph_inventory.script(c) for c in glyph_inventory.classes()[s]} for s in SPLITS]
    assert sum(map(len, scripts)) == len(set().union(*scripts)) == 15


def test_faces_and_charmaps_as_another_reader_sees_them():
    """Sixteen allowed faces, and every character of a class in the cmap of each face that draws it (fontTools)."""
    assert len(glyph_inventory.FACES) == len(set(glyph_inventory.FACES)) == 16
    assert not [f for f in glyph_inventory.FACES if f.startswith(("LastResort", "cm", "STIXNonUni", "STIXSiz"))]
    cmaps = {}
    for face in glyph_inventory.FACES:
        with TTFont(glyph_inventory.font_path(face), lazy=True) as font:
            cmaps[face] = font.getBestCmap().keys()
    for code in (c for codes in glyph_inventory.classes().values() for c in codes):
        assert glyph_inventory.faces_of(code) == [f for f in glyph_inventory.FACES if code in cmaps[f]] != []


def test_lookalikes_are_dropped_greedily():
    """Each kept shape is below the threshold to all kept ones, each dropped one reaches it to an earlier kept one."""
    codes = glyph_inventory.letters()
    kept = {c for split in glyph_inventory.classes().values() for c in split}
    shapes = [glyph_inventory.fit(glyph_inventory.draw(c, glyph_inventory.faces_of(c)[0]), 24) for c in codes]
    similarity = glyph_inventory.similarities(np.stack(shapes))
    stays = np.array([c in kept for c in codes])
    alike = np.tril(similarity >= glyph_inventory.LOOKALIKE, k=-1)[:, stays].any(1)
    assert (alike == ~stays).all()
    assert not {0x0391, 0x0410, 0xA4EE, 0x006F, 0x0555} & kept  # Alpha, Cyrillic A, Lisu A; o and Armenian Oh after O
    assert {0x0041, 0x004F} <= kept


def test_drop_lookalikes_by_hand():
    """0 drops 1; 2 is like the dropped 1 only and stays; the threshold itself is alike."""
    similarity = np.array([[1, 0.95, 0.2, 0.1], [0.95, 1, 0.95, 0.1], [0.2, 0.95, 1, 0.9], [0.1, 0.1, 0.9, 1]])
    assert glyph_inventory.drop_lookalikes(similarity, 0.9) == [0, 2]


def test_base_drawings_fill_their_box():
    """Ink touches both ends of the box in one direction at least, and no drawing is blank or missing."""
    for codes in glyph_inventory.classes().values():
        base = glyph_inventory.base_drawings(codes)
        ink = base.bitmaps > 0
        columns, rows = ink.any(1), ink.any(2)
        assert ((columns[:, 0] & columns[:, -1]) | (rows[:, 0] & rows[:, -1])).all()
        assert (base.bitmaps.max((1, 2)) > 127).all()
        assert base.faces.tolist() == [len(glyph_inventory.faces_of(c)) for c in codes]
        assert base.first[-1] + base.faces[-1] == len(base.bitmaps)


def test_no_distortion_is_the_mean_of_two_by_two_pixels():
    """20 of 28 pixels for a box of 40: each sample falls in the middle of four pixels of the base drawing."""
    base = torch.from_numpy(glyph_inventory.base_drawings(SAMPLE).bitmaps)
    picture = glyphs.distort(base, torch.zeros(len(base), glyphs.DRAWS))[:, 0].float()
    expected = torch.nn.functional.pad(base.float().unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)), (4,) * 4)
    torch.testing.assert_close(picture, expected, rtol=0, atol=0.5 + 1e-3)  # rounded to integers


def distorted_blob(**draws: float) -> torch.Tensor:
    """`[28, 28]` picture in 0..1 of a round Gaussian blob, with some of the draws at the value given."""
    place = {"weight": 0, "rotation": 1, "shear": 2, "scale_x": 3, "scale_y": 4, "shift_x": 5, "shift_y": 6}
    axis = torch.arange(glyph_inventory.BOX) - 19.5
    blob = (255 * torch.exp(-(axis**2 + axis[:, None] ** 2) / (2 * 5**2))).round().to(torch.uint8)
    u = torch.zeros(1, glyphs.DRAWS)
    for name, value in draws.items():
        u[0, place[name]] = value
    return glyphs.distort(blob[None], u)[0, 0] / 255


@pytest.mark.parametrize(
    ("draws", "area"),
    [
        ({"rotation": 1}, 1.0),
        ({"shear": 1}, 1.0),
        ({"scale_x": 1}, 1.25),
        ({"scale_x": -1, "scale_y": -1}, 0.75**2),
    ],
)
def test_areas(draws, area):
    """Rotation and shear keep the area, scales multiply it."""
    ratio = distorted_blob(**draws).sum() / distorted_blob().sum()
    assert ratio == pytest.approx(area, abs=0.005)  # of bilinear sampling and 8 bits


@pytest.mark.parametrize(("weight", "area"), [(1.0, 22**2), (0.5, (22**2 + 20**2) / 2), (0.0, 20**2), (-1.0, 18**2)])
def test_restroke_moves_the_edge_by_a_pixel(weight, area):
    """A square of side 20 grows to 22, shrinks to 18, and the blend is linear in between."""
    square = torch.nn.functional.pad(torch.ones(1, 1, 20, 20), (5,) * 4)
    assert glyphs.restroke(square, torch.tensor([weight])).sum() == area


@pytest.mark.parametrize(("name", "axis"), [("shift_x", 0), ("shift_y", 1)])
def test_shift_moves_by_sixteen_percent_of_half_the_box(name, axis):
    """1.6 of the 28 pixels, to the right or downwards."""
    picture = distorted_blob(**{name: 1.0})
    centre = (picture.sum(axis) * torch.arange(28)).sum() / picture.sum()
    assert centre == pytest.approx(13.5 + 1.6, abs=0.02)


def test_a_picture_depends_on_seed_code_point_and_drawing_only(monkeypatch):
    """Other neighbours, another number of drawings, other chunks: the same picture."""
    pictures = make().render(SAMPLE).view(len(SAMPLE), 20, 28, 28)
    few = make(drawings=7).render(SAMPLE[::-1]).view(len(SAMPLE), 7, 28, 28)
    assert torch.equal(pictures[:, :7], few.flip(0))
    monkeypatch.setattr(glyphs, "CHUNK", 3)
    assert torch.equal(pictures[:2].flatten(0, 1)[:, None], make().render(SAMPLE[:2]))


def test_split_order_does_not_matter(dataset):
    """Rows of the split equal the same characters rendered alone, in a set that loads another split first."""
    other = make()
    other.split("val")
    codes = glyph_inventory.classes()["test"][100:103]
    assert torch.equal(dataset.split("test").images[2000:2060], other.render(codes))
    assert torch.equal(dataset.split("val").images, other.split("val").images)


def test_seed_changes_every_picture():
    """And the same seed gives the same bits."""
    one, again, two = (make(seed=s).render(SAMPLE) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one != two).flatten(1).any(1).all()


@pytest.mark.parametrize("split", SPLITS)
def test_pictures(dataset, split):
    """Twenty different uint8 pictures a class, black ground and white ink, none blank."""
    pictures = dataset.split(split)
    classes = len(glyph_inventory.classes()[split])
    assert pictures.images.dtype == torch.uint8 and pictures.images.shape == (20 * classes, 1, 28, 28)
    assert pictures.sizes.tolist() == [20] * classes and pictures.first.tolist() == list(range(0, 20 * classes, 20))
    assert len(set(pictures.names)) == len(pictures.names) == classes
    flat = pictures.images.flatten(1)
    assert flat.min() == 0 and flat.max() == 255
    assert flat.amax(1).min() > 100 and (flat.amax(1) == 255).float().mean() > 0.5
    assert len(torch.unique(flat, dim=0)) == len(flat)


def test_names(dataset):
    """Code point and Unicode name."""
    assert dataset.split("val").names[0] == "U+03E2 COPTIC CAPITAL LETTER SHEI"
    assert dataset.split("train").names[0] == "U+0041 LATIN CAPITAL LETTER A"


def test_episodes(dataset):
    """Way, shot and queries exact, in class order; values in 0..1; test sizes apart from training's."""
    data = make(way=3, shot=2, queries=4, test_way=6, test_shot=1, test_queries=5)
    for split, (way, shot, queries) in {"val": (6, 1, 5), "train": (3, 2, 4)}.items():
        data._splits[split] = dataset.split(split)  # spares a rendering
        episode = data.fetch(split, data.draw(split, Key(0, "episodes"), torch.tensor(3), torch.arange(4)))
        assert episode.support.x.shape == (4, way * shot, 1, 28, 28)
        assert episode.query.x.shape == (4, way * queries, 1, 28, 28)
        assert episode.support.y.tolist() == [[c for c in range(way) for _ in range(shot)]] * 4
        assert episode.query.y.tolist() == [[c for c in range(way) for _ in range(queries)]] * 4
        assert 0 <= episode.query.x.min() and 0.9 < episode.query.x.max() <= 1
        assert all(len(set(row)) == way for row in episode.latent["class_ids"].tolist())


def test_support_and_query_are_disjoint(dataset):
    """All pictures of a task differ, and come from the class that the latent names."""
    draw = dataset.draw("test", Key(0, "episodes"), torch.tensor(0), torch.arange(50))
    assert all(len(set(row)) == 5 * 16 for row in draw["rows"].flatten(1).tolist())
    assert torch.equal(draw["rows"] // 20, draw["class_ids"][..., None].expand(-1, -1, 16))


def test_too_few_drawings_are_refused():
    """With the base class's message."""
    with pytest.raises(ValueError, match="dataset.shot \\+ dataset.queries = 16 exceeds the 10 images"):
        make(drawings=10).split("val")


def test_raw_pixels_are_neither_useless_nor_enough(dataset):
    """Nearest prototype of raw pixels, 5-way 1-shot on test scripts: 0.51 in 600 episodes."""
    episode = dataset.fetch("test", dataset.draw("test", Key(0, "eval"), torch.tensor(0), torch.arange(200)))
    distance = torch.cdist(episode.query.x.flatten(2), episode.support.x.flatten(2))
    assert 0.47 < (distance.argmin(-1) == episode.query.y).float().mean() < 0.55


def test_hash_names_drawings_seed_classes_and_fonts(monkeypatch):
    """Each changes the hash; nothing else (way, shot) does."""
    reference = make().data_hash()
    assert len(reference) == 16 and int(reference, 16) >= 0
    assert make(way=7, shot=3).data_hash() == reference
    class_list_hash = make(seed=3).class_list_hash
    hashes = {reference, make(drawings=19).data_hash(), make(seed=1).data_hash()}

    with monkeypatch.context() as patch:
        classes = glyph_inventory.classes()
        patch.setattr(glyph_inventory, "classes", lambda: {**classes, "val": classes["val"][:-1]})
        assert make().class_list_hash != class_list_hash
        hashes.add(make().data_hash())
    with monkeypatch.context() as patch:  # the same classes in other drawings
        base = glyph_inventory.base_drawings
        patch.setattr(glyph_inventory, "base_drawings", lambda c: base(c)._replace(bitmaps=base(c).bitmaps[:, ::-1]))
        hashes.add(make().data_hash())
    assert len(hashes) == 5 and make().data_hash() == reference


def test_a_result_names_the_class_list(dataset):
    """Two results on other fonts can so be told to have the same classes, or not."""
    glyphs, sinusoid = (expand([f"dataset={name}"])[0].config["dataset"] for name in ("glyphs", "sinusoid"))
    found = versions(glyphs)
    assert found.pop("class_list_hash") == dataset.class_list_hash and found == versions(sinusoid)


def test_hash_needs_no_torch_and_writes_no_file(tmp_path):
    """The launching code asks for it before anything heavy is imported; another process agrees."""
    code = (
        "import sys; from metalearn.datasets import glyph_inventory as g; print(g.data_hash(20, 0)); "
        "assert not {'torch', 'matplotlib.pyplot'} & sys.modules.keys()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(metalearn.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == make().data_hash()
    assert not list(tmp_path.iterdir())
