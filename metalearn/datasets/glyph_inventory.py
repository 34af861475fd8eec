"""Which characters the `glyphs` set has, and their undistorted drawings; needs no torch.

The characters come from the fonts that matplotlib installs, so another matplotlib (or FreeType) may give other
contents; `data_hash` then differs. Everything is computed in memory, once per process.
"""

import functools
import hashlib
import unicodedata
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

RECIPE = "glyphs-1"
"""Version of all that makes the pictures, the distortion in `glyphs.py` included; raise it with every change."""

FACES = (
    *(f"DejaVuSans{width}{style}" for width in ("", "Mono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
"""The 16 faces, as file stems. Left out: LastResort (draws a box for every code point), cm* (private encodings),
STIXNonUni* and STIXSiz* (private use), the Display cuts (a handful of characters)."""

SCRIPTS = {
    "train": ("LATIN", "CANADIAN", "CYRILLIC", "GREEK"),
    "val": ("GEORGIAN", "OLD", "COPTIC"),
    "test": ("ARABIC", "ARMENIAN", "HEBREW", "NKO", "LAO", "OGHAM", "TIFINAGH", "LISU"),
}
"""Scripts of each split, by the first word of their characters' names (CANADIAN SYLLABICS, OLD ITALIC)."""

SIZE = 48
"""Font size in pixels at which characters are drawn."""

BOX = 40
"""Side in pixels of a base drawing."""

LOOKALIKE_BOX = 24
"""Side in pixels of the drawings that are compared to find look-alikes."""

LOOKALIKE = 0.90
"""Cosine similarity from which two shapes count as one class."""


class BaseDrawings(NamedTuple):
    """Undistorted drawings of some characters in every face that has them, sorted by character, then by face.

    bitmaps: uint8 `[n, BOX, BOX]`, ink = 255; first: int64 `[characters]`, the row of each character's first face;
    faces: int64 `[characters]`, faces per character.
    """

    bitmaps: np.ndarray
    first: np.ndarray
    faces: np.ndarray


def font_path(face: str) -> Path:
    """The file of a face in matplotlib's data folder."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@functools.cache
def charmaps() -> dict[str, frozenset[int]]:
    """The code points that each face really has (its cmap; a missing glyph would be drawn as a box)."""
    return {face: frozenset(FT2Font(str(font_path(face))).get_charmap()) for face in FACES}


def faces_of(code_point: int) -> list[str]:
    """The faces that have a character, in the order of `FACES`."""
    return [face for face, codes in charmaps().items() if code_point in codes]


def script(code_point: int) -> str:
    """First word of a character's Unicode name: LATIN, CANADIAN, ..."""
    return unicodedata.name(chr(code_point)).split()[0]


@functools.cache
def letters() -> tuple[int, ...]:
    """Code points, ascending, of the letters of the 15 scripts that some face has.

    A letter has general category L* and no decomposition; that drops accented and presentation forms and combining
    marks. Modifier letters go because their names start with no script (MODIFIER LETTER ...); the twelve of category
    Lm that are named after one (Lisu tone letters, LAO KO LA, ...) stay, and are among the published 1,783.
    """
    wanted = {name for scripts in SCRIPTS.values() for name in scripts}
    codes = sorted(set().union(*charmaps().values()))
    plain = [c for c in codes if unicodedata.category(chr(c))[0] == "L" and not unicodedata.decomposition(chr(c))]
    return tuple(c for c in plain if script(c) in wanted)


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(face)), SIZE, layout_engine=ImageFont.Layout.BASIC)


def draw(code_point: int, face: str) -> Image.Image:
    """A character at `SIZE` pixels, white on black, cropped to its ink."""
    font, text = _font(face), chr(code_point)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return image.crop(image.getbbox())


def fit(image: Image.Image, box: int) -> np.ndarray:
    """A picture scaled, its aspect kept, so that the longer side fills the box; centred; uint8 `[box, box]`."""
    scale = box / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("L", (box, box))
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(scaled, ((box - width) // 2, (box - height) // 2))
    return np.asarray(canvas)


def similarities(bitmaps: np.ndarray) -> np.ndarray:
    """Cosines between pictures.

    Args:
        bitmaps: uint8 `[n, height, width]`, none blank.

    Returns:
        `[n, n]` float64. The inner products are sums of integers below 2^53, so they are exact on every machine.
    """
    x = bitmaps.reshape(len(bitmaps), -1).astype(np.float64)
    gram = x @ x.T
    norm = np.sqrt(np.diag(gram))
    return gram / norm[:, None] / norm[None]


def drop_lookalikes(similarity: np.ndarray, threshold: float = LOOKALIKE) -> list[int]:
    """Indices, ascending, that stay if each item in turn is kept unless it is `threshold` alike to a kept one.

    Args:
        similarity: `[n, n]`, symmetric.
        threshold: items at or above it are look-alikes.
    """
    kept: list[int] = []
    nearest = np.full(len(similarity), -np.inf)  # similarity of each item to the kept one most like it
    for i in range(len(similarity)):
        if nearest[i] < threshold:
            kept.append(i)
            np.maximum(nearest, similarity[i], out=nearest)
    return kept


@functools.cache
def classes() -> dict[str, tuple[int, ...]]:
    """Code points of each split's classes, ascending: the letters without look-alikes.

    Shapes are compared in the first face that has the letter, each scaled to one size, so A, Alpha and Cyrillic A
    are one class (the first in code-point order) and so are o and O. Size, like place, carries no class.
    """
    codes = letters()
    shapes = np.stack([fit(draw(c, faces_of(c)[0]), LOOKALIKE_BOX) for c in codes])
    kept = [codes[i] for i in drop_lookalikes(similarities(shapes))]
    return {split: tuple(c for c in kept if script(c) in scripts) for split, scripts in SCRIPTS.items()}


@functools.cache
def base_drawings(code_points: tuple[int, ...]) -> BaseDrawings:
    """The base drawings of some characters: drawn at `SIZE`, cropped to the ink, fitted to a box of `BOX` pixels."""
    bitmaps = [fit(draw(c, face), BOX) for c in code_points for face in faces_of(c)]
    faces = np.array([len(faces_of(c)) for c in code_points], dtype=np.int64)
    return BaseDrawings(np.stack(bitmaps), np.cumsum(faces) - faces, faces)


def class_list_hash() -> str:
    """Sixteen hex digits over the code points of the three splits."""
    return hashlib.sha256(repr(sorted(classes().items())).encode()).hexdigest()[:16]


def data_hash(drawings: int, seed: int) -> str:
    """Sixteen hex digits over the classes, their base drawings, the recipe, pictures per class and seed."""
    digest = hashlib.sha256(f"{RECIPE} drawings={drawings} seed={seed} {class_list_hash()}".encode())
    for _, code_points in sorted(classes().items()):
        base = base_drawings(code_points)
        digest.update(base.faces.tobytes())
        digest.update(base.bitmaps.tobytes())
    return digest.hexdigest()[:16]
