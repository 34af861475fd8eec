"""Arrays in an .npz file: checking them and dividing their classes or tasks; imports no torch."""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from metalearn.datasets.archives import content_hash
from metalearn.datasets.partition import SPELLINGS, SPLITS, by_fractions, described, digest
from metalearn.schema.keys import BadInput

Kind = Literal["classification", "regression"]

REAL, NAMES = "fiub", "iubUS"
"""Kinds of dtypes that are numbers, and that name a class or task."""

GROUP = {"classification": ("y", "class", "classes"), "regression": ("task", "task", "tasks")}
"""Which array says what an example belongs to, and what that is called."""


class Request(NamedTuple):
    """Which arrays are asked for; see `Arrays` and `ArraysRegression` for the keys."""

    root: str
    kind: Kind
    fractions: tuple[float, ...]
    seed: int

    def refusal(self, why: object) -> BadInput:
        """The error, with key and value."""
        return BadInput(f"dataset.root={self.root}: {why}")

    @property
    def path(self) -> Path:
        """Of the file."""
        return Path(self.root).expanduser()

    @property
    def needed(self) -> tuple[str, ...]:
        """Arrays that must be there; `split` may be."""
        return ("x", "y") if self.kind == "classification" else ("x", "y", "task")


class Header(NamedTuple):
    """What an array's first bytes say."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Found(NamedTuple):
    """Arrays that are checked and divided.

    rows: split -> name of the class or task -> rows of its examples, ascending, `[n]` int64.
    data_hash: names contents and division; how: where the division comes from; groups: `classes` or `tasks`.
    """

    rows: dict[str, dict[str, np.ndarray]]
    data_hash: str
    how: str
    groups: str

    def sizes(self) -> dict[str, dict[str, int]]:
        """Examples of each class or task of each split."""
        return {split: {name: len(rows) for name, rows in found.items()} for split, found in self.rows.items()}

    def versions(self) -> dict[str, str]:
        """What a result says of it."""
        return described(self.rows, self.how, self.groups)


_found: dict[Request, Found] = {}


def find(request: Request) -> Found:
    """As `prepare`, or what that returned before in this process."""
    return _found[request] if request in _found else prepare(request)


def prepare(request: Request) -> Found:
    """Check the arrays of a file (whose numbers are read only if the file is new) and divide its classes or tasks.

    Raises:
        BadInput: if they cannot be used.
    """
    found = headers(request)
    used = [*request.needed, *(["split"] if "split" in found else [])]
    try:
        members = re.compile(rf"^((?:{'|'.join(used)})\.npy)$")
        content = content_hash([request.path], members, lambda _: _refuse_not_finite(request))
    except ValueError as error:
        raise request.refusal(error) from None
    array, group, groups = GROUP[request.kind]
    names = _texts(read(request, array))
    order = np.argsort(names, kind="stable")
    values, first = np.unique(names[order], return_index=True)
    rows = {str(v): r for v, r in zip(values, np.split(order, first[1:]), strict=True)}
    if "split" in found:
        division, how = _given(request, rows, group), "as the array split says"
    else:
        division = by_fractions(rows, request.fractions, request.seed)
        how = f"by dataset.fractions and dataset.seed={request.seed}"
    chosen = {s: {name: rows[name] for name in _sorted(division[s])} for s in SPLITS}
    _found[request] = Found(chosen, digest(content, request.kind, division), how, groups)
    return _found[request]


def read(request: Request, name: str) -> np.ndarray:
    """One of the arrays; nothing is ever unpickled."""
    try:
        with np.load(request.path, allow_pickle=False) as file:
            return file[name]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise request.refusal(f"cannot read '{name}': {error}") from None


def headers(request: Request) -> dict[str, Header]:
    """Shapes and types of the arrays, which are checked, without reading them.

    Raises:
        BadInput: if arrays are missing, of another length than `x`, or of types that cannot be used.
    """
    if not request.path.exists():
        raise request.refusal("no such file")
    if request.path.is_dir() or not zipfile.is_zipfile(request.path):
        raise request.refusal("is not an .npz file; make one with numpy.savez")
    with zipfile.ZipFile(request.path) as file:
        members = [name for name in file.namelist() if name.endswith(".npy")]
        found = {name.removesuffix(".npy"): _header(file, name, request) for name in members}
    for name in request.needed:
        if name not in found:
            raise request.refusal(
                f"has no array '{name}', which {request.kind} needs; it holds {', '.join(found) or 'no arrays'}"
            )
    kinds = {"x": REAL, "y": REAL, "task": NAMES, "split": "US"}
    if request.kind == "classification":
        kinds["y"] = NAMES
    for name in (*request.needed, *({"split"} & found.keys())):
        _check(request, name, found[name], kinds[name], len_x=found["x"].shape[:1])
    return found


def _header(file: zipfile.ZipFile, name: str, request: Request) -> Header:
    try:
        with file.open(name) as opened:
            version = np.lib.format.read_magic(opened)
            parse = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = parse(opened)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise request.refusal(f"cannot read {name}: {error}") from None
    return Header(shape, dtype)


def _check(request: Request, name: str, header: Header, kinds: str, len_x: tuple[int, ...]) -> None:
    shape, dtype = header
    if dtype.hasobject:
        raise request.refusal(
            f"'{name}' holds Python objects, which are never unpickled; save numbers, or texts as "
            f"numpy.array({name}, dtype=str)"
        )
    if dtype.kind not in kinds:
        wanted = {REAL: "real numbers", NAMES: "whole numbers or texts", "US": "texts"}[kinds]
        raise request.refusal(f"'{name}' is of type {dtype}; must be {wanted}")
    most = {"x": 4, "y": 2 if kinds == REAL else 1}.get(name, 1)
    if not 1 <= len(shape) <= most or 0 in shape:
        raise request.refusal(f"'{name}' has the shape {shape}; must have 1 to {most} dimensions, none of them empty")
    if shape[:1] != len_x:
        raise request.refusal(f"'{name}' has {shape[0]} rows and 'x' has {len_x[0]}; must be equally many")


def _refuse_not_finite(request: Request) -> None:
    for name in ("x", "y"):
        array = read(request, name)
        if array.dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(array.astype(np.float32).reshape(len(array), -1)).all(1))[:, 0]
        if len(bad):
            raise request.refusal(
                f"'{name}' has numbers that are not finite (in float32) in {len(bad)} rows, the first of them {bad[0]}"
            )


def _given(request: Request, rows: dict[str, np.ndarray], group: str) -> dict[str, list[str]]:
    """The classes or tasks of each split, as the array `split` says of their rows."""
    said = _texts(read(request, "split"))
    division: dict[str, list[str]] = {s: [] for s in SPLITS}
    for name, own in rows.items():
        found = sorted(set(said[own].tolist()))
        if len(found) > 1:
            raise request.refusal(f"'split' puts {group} '{name}' in {' and in '.join(map(repr, found))}; must be one")
        if found[0] not in SPELLINGS:
            raise request.refusal(f"'split' has the value {found[0]!r}; must be one of {', '.join(SPLITS)}")
        division[SPELLINGS[found[0]]].append(name)
    return {s: sorted(names) for s, names in division.items()}


def _texts(array: np.ndarray) -> np.ndarray:
    """Names of classes, tasks or splits."""
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8")
    return array.astype(str)


def _sorted(names: list[str]) -> list[str]:
    """By number where all are numbers, else by text."""
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def input_shape(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Of one example, from that of x: `[n]`, `[n, D]`, grey pictures `[n, H, W]`, pictures `[n, C, H, W]`.

    With `channels_last` pictures are `[n, H, W, C]`.
    """
    own = shape[1:]
    if len(own) < 2:
        return own or (1,)
    return (1, *own) if len(own) == 2 else (own[2], *own[:2]) if channels_last else own


def side(request: Request, channels_last: bool) -> int | None:
    """The smaller side of pictures; None if examples are no pictures."""
    shape = input_shape(headers(request)["x"].shape, channels_last)
    return min(shape[1:]) if len(shape) == 3 else None
