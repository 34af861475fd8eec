"""Options of verbs: parsed by argparse, refused like every other bad input."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from metalearn import cells
from metalearn.cells import Cell
from metalearn.schema import BadInput


class Parser(argparse.ArgumentParser):
    """The parser of `metalearn <verb>`: what is wrong is one line with the way to help, and exit code 2.

    Args:
        verb: the words after `metalearn`.
        description: printed as it is.
    """

    def __init__(self, verb: str, description: str):
        self.verb = verb
        super().__init__(
            prog=f"metalearn {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{self.verb}: {message}; see {self.prog} --help")

    def take_cells(self) -> None:
        """Take groups and keys as a sweep does (parse with `parse_intermixed_args`)."""
        self.add_argument("overrides", nargs="*", metavar="key=value", help="groups and keys, as after metalearn -m")
        self.add_argument("--config-dir", "-cd", metavar="FOLDER", help="further yaml files, as for metalearn itself")


def read_cells(options: argparse.Namespace, *, tolerant: bool = True) -> list[Cell]:
    """The cells that the groups and keys of a verb mean (see `Parser.take_cells`)."""
    return cells.expand(options.overrides, config_dirs(options), tolerant=tolerant)


def refuse_place(output_dir: str) -> None:
    """Refuse a folder of results that cannot be made or written to.

    Raises:
        BadInput: naming it.
    """
    place = Path(output_dir).absolute()
    existing = next(p for p in (place, *place.parents) if p.exists())
    if not existing.is_dir():
        raise BadInput(f"output_dir={output_dir}: {existing} is a file; name a folder")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"output_dir={output_dir}: cannot be made: {error.strerror}") from None
    if not os.access(place, os.W_OK | os.X_OK):
        raise BadInput(f"output_dir={output_dir}: cannot be written to")


def config_dirs(options: argparse.Namespace) -> list[str]:
    """The folders of further yaml files that a verb was given."""
    return [options.config_dir] if options.config_dir else []


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An option's type: a whole number within bounds."""

    def read(text: str) -> int:
        bound = f"a whole number >= {least}" if most is None else f"a whole number in {least}..{most}"
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: must be {bound}") from error
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text}: must be {bound}")
        return value

    return read
