"""How the classes (or tasks) of people's own data are divided into train, val and test; imports no torch."""

import csv
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn.schema.keys import BadInput, nearest

Names = dict[str, list[str]]
"""Split -> names of its classes, sorted."""

SPLITS = ("train", "val", "test")
SPELLINGS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def by_fractions(names: Iterable[str], fractions: Sequence[float], seed: int) -> Names:
    """The names cut into three, in an order that only `seed` and the names themselves decide.

    Each name's place is a hash of seed and name (a keyed draw that needs no torch), so the order of a folder's listing
    does not matter.

    Args:
        names: of all classes.
        fractions: shares of train, val and test, which sum to 1; bounds are rounded to whole classes.
        seed: of the order.
    """
    ordered = sorted(set(names), key=lambda name: (hashlib.blake2b(f"{seed}:{name}".encode()).digest(), name))
    bounds = [round(sum(fractions[:i]) * len(ordered)) for i in range(4)]
    return {s: sorted(ordered[a:b]) for s, a, b in zip(SPLITS, bounds, bounds[1:], strict=False)}


def from_file(key: str, path: str | Path, known: Collection[str]) -> Names:
    """The division that a file gives: json `{"train": [names], ...}`, or csv with the columns `class` and `split`.

    Classes that the file does not name are left out.

    Args:
        key: of the configuration, for messages.
        path: of the file.
        known: all classes there are.

    Raises:
        BadInput: if the file cannot be read, or names a class twice or one that does not exist.
    """
    file = Path(path).expanduser()
    try:
        rows = _from_csv(file) if file.suffix.lower() == ".csv" else _from_json(file)
    except FileNotFoundError:
        raise BadInput(f"{key}={path}: no such file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{key}={path}: {error}") from None
    found: Names = {s: [] for s in SPLITS}
    where: dict[str, str] = {}
    for name, split in rows:
        if split not in SPELLINGS:
            raise BadInput(f"{key}={path}: no such split '{split}'; must be one of {', '.join(SPLITS)}")
        if name not in known:
            raise BadInput(f"{key}={path}: no class '{name}' in the data{nearest(name, known)}")
        if where.setdefault(name, SPELLINGS[split]) != SPELLINGS[split]:
            raise BadInput(f"{key}={path}: class '{name}' is in '{where[name]}' and in '{SPELLINGS[split]}'")
        found[SPELLINGS[split]].append(name)
    return {split: sorted(set(names)) for split, names in found.items()}


def _from_json(file: Path) -> list[tuple[str, str]]:
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(names, list) for names in content.values()):
        raise ValueError('must hold {"train": [class names], "val": [...], "test": [...]}')
    return [(str(name), split) for split, names in content.items() for name in names]


def _from_csv(file: Path) -> list[tuple[str, str]]:
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened)
        if not {"class", "split"} <= set(reader.fieldnames or ()):
            raise ValueError("its first line must name the columns class and split")
        return [(row["class"] or "", row["split"] or "") for row in reader]


def digest(*values: object) -> str:
    """Sixteen hex digits over plain data."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def described(names: Mapping[str, Collection[str]], how: str, group: str = "classes") -> dict[str, str]:
    """What a result says of a division: its sizes, where it comes from, and a hash of the sorted names."""
    sizes = "/".join(str(len(names[split])) for split in SPLITS)
    listed = {split: sorted(names[split]) for split in SPLITS}
    return {"split": f"{sizes} {group} in train/val/test, {how}", "class_list_hash": digest(listed)}
