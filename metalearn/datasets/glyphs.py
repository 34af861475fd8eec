"""`glyphs`: hand-drawn-like characters from matplotlib's fonts, made in memory without any download.

A stand-in for Omniglot with its sizes (28x28, 20 pictures a class, new alphabets in validation and test), never to be
compared with Omniglot's numbers. Class = character shape, alphabet = script, picture = typeface and distortion.
"""

import unicodedata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metalearn.datasets import glyph_inventory
from metalearn.datasets.base import ClassImages, ImageDataset, Split
from metalearn.random import Key

SIDE = 28
FRAME = 56 / glyph_inventory.BOX
"""Side of a picture in units of the base drawing's: the undistorted character spans 20 of the 28 pixels."""

MARGIN = 2
"""Empty pixels around a base drawing, so that strokes can grow outwards."""

CHUNK = 1024
"""Pictures rendered at a time (bounds the memory; the pictures do not depend on it)."""

DRAWS = 1 + 1 + 1 + 2 + 2 + 2 * 16
"""Random numbers of one picture: weight, rotation, shear, scales, shifts, displacements at 4x4 points."""


def restroke(ink: Tensor, weight: Tensor) -> Tensor:
    """Strokes made bolder or thinner by up to a pixel on either side.

    Args:
        ink: `[n, 1, h, w]` in 0..1.
        weight: `[n]` in -1..1: the share of the 3x3 maximum (positive) or minimum (negative) in the blend.
    """
    weight = weight[:, None, None, None]
    sign = torch.where(weight < 0, -1.0, 1.0)
    target = sign * F.max_pool2d(sign * ink, kernel_size=3, stride=1, padding=1)
    return ink + weight.abs() * (target - ink)


def warp(u: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel of a picture comes from: shift, rotation, shear, scales and a smooth displacement.

    Lengths are in half sides of the base drawing, whose square is [-1, 1]^2.

    Args:
        u: `[n, DRAWS - 1]` in -1..1, which the ranges scale: shift 0.16 on each axis, rotation 18 degrees,
            shear 0.3, scale 25 % on each axis, displacement 0.16 at 4x4 points with bicubic interpolation.

    Returns:
        x and y in the base drawing, `[n, SIDE, SIDE]` each.
    """
    angle = torch.deg2rad(18 * u[:, 0].double())  # rounded from double: the same bits for every chunk size
    cos, sin = angle.cos().float()[:, None, None], angle.sin().float()[:, None, None]
    shear, scale, shift = 0.3 * u[:, 1], 1 + 0.25 * u[:, 2:4], 0.16 * u[:, 4:6]
    axis = FRAME * ((2 * torch.arange(SIDE) + 1) / SIDE - 1)
    x, y = axis - shift[:, 0, None, None], axis[:, None] - shift[:, 1, None, None]
    x, y = cos * x - sin * y, sin * x + cos * y
    x = x + shear[:, None, None] * y
    bend = F.interpolate(0.16 * u[:, 6:].reshape(-1, 2, 4, 4), size=SIDE, mode="bicubic", align_corners=True)
    return x / scale[:, 0, None, None] + bend[:, 0], y / scale[:, 1, None, None] + bend[:, 1]


def distort(base: Tensor, u: Tensor) -> Tensor:
    """The pictures of some base drawings.

    Args:
        base: uint8 `[n, BOX, BOX]`, ink = 255.
        u: `[n, DRAWS]` in -1..1: stroke weight, then as in `warp`.

    Returns:
        uint8 `[n, 1, SIDE, SIDE]`, ink = 255; each depends on its own row of `base` and `u` alone.
    """
    ink = restroke(F.pad(base[:, None].float() / 255, (MARGIN,) * 4), u[:, 0])
    grid = torch.stack(warp(u[:, 1:]), dim=-1) * (base.shape[-1] / ink.shape[-1])
    return (F.grid_sample(ink, grid, mode="bilinear", align_corners=False) * 255).round().to(torch.uint8)


class Glyphs(ImageDataset):
    """Distorted characters of matplotlib's fonts, split by script: 847 / 141 / 292 classes with matplotlib 3.11.2.

    Picture d of a character is its face number d (cyclically), distorted at random. It depends on the seed, the fonts,
    the code point and d only, so asking for more drawings keeps the first ones. A split is rendered when it is first
    used, in a few seconds; no file is written.

    Args:
        drawings: pictures per class.
        arguments: those of `ImageDataset`; `seed` sets the distortions (and the label groups).
    """

    input_shape = (1, SIDE, SIDE)

    def __init__(self, *, drawings: int = 20, **arguments: Any):
        super().__init__(**arguments)
        self.drawings = drawings

    def classes(self, split: Split) -> int:
        return len(glyph_inventory.classes()[split])

    def load(self, split: Split) -> ClassImages:
        """Render the pictures of a split, on the CPU."""
        code_points = glyph_inventory.classes()[split]
        names = tuple(f"U+{c:04X} {unicodedata.name(chr(c))}" for c in code_points)
        count = torch.full((len(names),), self.drawings)
        return ClassImages(self.render(code_points), torch.arange(len(names)) * self.drawings, count, names)

    def render(self, code_points: tuple[int, ...]) -> Tensor:
        """The pictures of some characters, uint8 `[characters * drawings, 1, SIDE, SIDE]`, sorted by character."""
        base, first, faces = map(torch.from_numpy, glyph_inventory.base_drawings(code_points))
        codes, key = torch.tensor(code_points), Key(self.seed, "glyphs/distortion")
        chunks = []
        for rows in torch.arange(len(codes) * self.drawings).split(CHUNK):
            i, d = rows // self.drawings, rows % self.drawings
            u = key.uniform(DRAWS, codes[i], d, low=-1.0, high=1.0)
            chunks.append(distort(base[first[i] + d % faces[i]], u))
        return torch.cat(chunks)

    @property
    def class_list_hash(self) -> str:
        """Sixteen hex digits that name the classes and their split, whatever their pictures."""
        return glyph_inventory.class_list_hash()

    def data_hash(self) -> str:
        """Sixteen hex digits over classes, base drawings, recipe, `drawings` and seed; see `glyph_inventory`."""
        return glyph_inventory.data_hash(self.drawings, self.seed)
