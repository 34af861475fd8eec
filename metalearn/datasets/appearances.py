"""Appearances of pictures with bright ink, to make groups of tasks that look different; imports no torch.

All arithmetic is in whole numbers, so pictures are the same on every machine, and each depends on itself alone.
"""

import math
from collections.abc import Callable

import numpy as np

RECIPE = "appearances-1"
"""Version of all that is below; raise it with every change of a picture."""

CHUNK = 4096
"""Pictures transformed at a time (bounds the memory)."""

BINOMIAL = (1, 4, 6, 4, 1)
TURN, ZOOM = 45, 0.9
"""Degrees and scale of `outlined`; 45 is as far as can be from Omniglot's turns by multiples of 90."""


def blurred(ink: np.ndarray) -> np.ndarray:
    """Dark ink on a bright ground, out of focus: a 5x5 binomial filter, then inverted."""
    grey, n = np.pad(ink.astype(np.int32), ((0, 0), (2, 2), (2, 2))), ink.shape[-1]
    grey = sum(w * grey[:, i : i + n] for i, w in enumerate(BINOMIAL))  # type: ignore[assignment]
    grey = sum(w * grey[:, :, i : i + n] for i, w in enumerate(BINOMIAL))  # type: ignore[assignment]
    return (255 - (grey + 128) // 256).astype(np.uint8)


def outlined(ink: np.ndarray) -> np.ndarray:
    """The outlines of thickened strokes, turned by 45 degrees: two 3x3 dilations without the ink itself."""
    return turned(dilated(dilated(ink)) - ink, TURN, ZOOM)


def dilated(ink: np.ndarray) -> np.ndarray:
    """The greatest value in each 3x3 neighbourhood."""
    n, padded = ink.shape[-1], np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    rows = np.maximum(np.maximum(padded[:, :n], padded[:, 1 : n + 1]), padded[:, 2:])
    return np.maximum(np.maximum(rows[:, :, :n], rows[:, :, 1 : n + 1]), rows[:, :, 2:])


def turned(ink: np.ndarray, degrees: float, zoom: float) -> np.ndarray:
    """Turned clockwise about the centre and scaled, with bilinear interpolation (weights in 1/256); 0 from outside.

    Args:
        ink: uint8 `[n, side, side]`.
        degrees: angle.
        zoom: size of the result's characters over the original's.
    """
    side = ink.shape[-1]
    axis = np.arange(side) - (side - 1) / 2
    cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
    x = np.rint(256 * (cos * axis + sin * axis[:, None] + (side - 1) / 2)).astype(np.int64)
    y = np.rint(256 * (cos * axis[:, None] - sin * axis + (side - 1) / 2)).astype(np.int64)
    flat, total = ink.reshape(len(ink), -1), np.full((len(ink), side, side), 2**15, np.int32)
    for right in (0, 1):
        for below in (0, 1):
            column, row = (x >> 8) + right, (y >> 8) + below
            weight = np.abs((x & 255) - 256 * (1 - right)) * np.abs((y & 255) - 256 * (1 - below))
            inside = (0 <= column) & (column < side) & (0 <= row) & (row < side)
            place = np.where(inside, row * side + column, 0)
            total += (weight * inside).astype(np.int32) * flat[:, place]
    return (total >> 16).astype(np.uint8)


APPEARANCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda ink: ink,
    "blurred": blurred,
    "outlined": outlined,
}
"""From uint8 pictures `[n, side, side]` with bright ink on a dark ground to pictures of the same shape."""


def render(name: str, pictures: np.ndarray) -> np.ndarray:
    """Pictures in one of the appearances.

    Args:
        name: of the appearance.
        pictures: uint8 `[n, channels, side, side]`, ink 255.

    Returns:
        uint8 of the same shape.
    """
    out, flat = np.empty_like(pictures), pictures.reshape(-1, *pictures.shape[-2:])
    view = out.reshape(flat.shape)
    for start in range(0, len(flat), CHUNK):
        view[start : start + CHUNK] = APPEARANCES[name](flat[start : start + CHUNK])
    return out
