"""How one key of the configuration is declared and checked."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

Touches = Literal["train", "test", "none"]


MOST_NAMES = 12
"""How many names a message lists."""


def few(names: Iterable[str]) -> str:
    """Names for a message, the first of many."""
    listed = list(names)
    more = f" and {len(listed) - MOST_NAMES} more" if len(listed) > MOST_NAMES else ""
    return ", ".join(listed[:MOST_NAMES]) + more


class BadInput(Exception):
    """The user asked for something that cannot be; the message (at most three lines) names key, value and bound."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Declaration of a key.

    Attributes:
        doc: meaning, with its unit.
        touches: `train` (also selection), `test`, or `none` (nothing beyond rounding).
        choices: allowed values.
        gt, ge, lt, le: bounds of a number, or of each number of a list.
        length: exact length of a list.
        first_touches: what the first item of a list touches, where that differs.
        required: no default; must be given.
        sections: the group whose members' sections a mapping holds, by names that the user gives.
        words: texts that are allowed in place of a number, as `auto`.
    """

    doc: str
    touches: Touches = "train"
    choices: tuple[Any, ...] | None = None
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    length: int | None = None
    first_touches: Touches | None = None
    required: bool = False
    sections: str | None = None
    words: tuple[str, ...] = ()

    def bound(self) -> str:
        """The allowed range in words."""
        if self.choices:
            return "one of " + ", ".join(str(c) for c in self.choices)
        limits = [(">", self.gt), (">=", self.ge), ("<", self.lt), ("<=", self.le)]
        return " and ".join(f"{sign} {show(limit)}" for sign, limit in limits if limit is not None)


def key(default: Any, doc: str, **rest: Any) -> Any:
    """A dataclass field that declares a key; a default of `...` marks a required one."""
    declared = Key(doc, required=default is ..., **rest)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata={"key": declared})
    return dataclasses.field(default="???" if default is ... else default, metadata={"key": declared})


@dataclasses.dataclass(frozen=True)
class Field:
    """A declared key with its name, type and default."""

    name: str
    type: Any
    default: Any
    key: Key

    def check(self, path: str, value: Any) -> Any:
        """The value in its declared type.

        Raises:
            BadInput: naming path, value and bound.
        """
        if self.lacks(value):
            raise BadInput(f"{path} is required: {self.key.doc}")
        if isinstance(value, str) and value in self.key.words:
            return value
        given = f"{path}={show(value)}"
        try:
            value = _convert(value, self.type)
        except (TypeError, ValueError, OverflowError):
            hint = nearest(str(value), self.key.words)
            raise BadInput(f"{given}: must be {self.expected()}{hint}") from None
        items = value if isinstance(value, list) else [value]
        if self.key.length is not None and len(items) != self.key.length:
            raise BadInput(f"{given}: must have {self.key.length} values")
        for item in items:
            if item is not None and not self._inside(item):
                hint = nearest(str(item), [str(c) for c in self.key.choices]) if self.key.choices else ""
                raise BadInput(f"{given}: must be {self._or_words(self.key.bound())}{hint}")
        return value

    def expected(self) -> str:
        """The type, the range, and the words that may stand for a number: `a finite number (>= 0), auto or online`."""
        bound = f" ({self.key.bound()})" if self.key.bound() else ""
        return self._or_words(_type_name(_number(self.type) if self.key.words else self.type) + bound)

    def _or_words(self, text: str) -> str:
        *first, last = (text, *self.key.words)
        return f"{', '.join(first)} or {last}" if first else last

    def lacks(self, value: Any) -> bool:
        """Whether the key has to be given and is not."""
        return self.key.required and value in ("???", None)

    def _inside(self, value: Any) -> bool:
        if self.key.choices:
            return value in self.key.choices
        low = (self.key.gt is None or value > self.key.gt) and (self.key.ge is None or value >= self.key.ge)
        return low and (self.key.lt is None or value < self.key.lt) and (self.key.le is None or value <= self.key.le)


def fields_of(schema: type) -> dict[str, Field]:
    """The keys that a schema dataclass declares, by name."""
    hints = typing.get_type_hints(schema)
    out = {}
    for field in dataclasses.fields(schema):
        make = field.default_factory
        default = make() if callable(make) else field.default
        out[field.name] = Field(field.name, hints[field.name], default, field.metadata["key"])
    return out


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`; numbers must be written as numbers, and only whole numbers are integers."""
    if isinstance(kind, types.UnionType):
        if value is None:
            if type(None) in kind.__args__:
                return None
            raise TypeError
        return _convert(value, _number(kind))
    if typing.get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            raise TypeError
        return [_convert(v, kind.__args__[0]) for v in value]
    if isinstance(value, float) and not math.isfinite(value) and kind is not str:
        raise TypeError
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


def _number(kind: Any) -> Any:
    """The type of a union that values are converted to: the first, besides that of null."""
    return next(k for k in kind.__args__ if k is not type(None))


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", dict: "a mapping"}
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if k is type(None) else _type_name(k) for k in kind.__args__)
    if typing.get_origin(kind) is list:
        return f"a list, each {_type_name(kind.__args__[0])}"
    return names[kind]


def show(value: Any) -> str:
    """The value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(show, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
