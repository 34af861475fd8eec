"""Every key of a run: type, range, default, meaning, and what it touches. Imports no torch."""

from metalearn.schema.keys import BadInput, Key, fields_of, nearest
from metalearn.schema.registry import GROUPS, MEMBERS, member_of, register, sections
from metalearn.schema.validate import validate

__all__ = [
    "GROUPS",
    "MEMBERS",
    "BadInput",
    "Key",
    "fields_of",
    "member_of",
    "nearest",
    "register",
    "sections",
    "validate",
]
