"""Every key of a run: type, range, default, meaning, and what it touches. Imports no torch."""

from metalearn.schema.keys import BadInput, Key, fields_of, nearest
from metalearn.schema.registry import GROUPS, MEMBERS, groups_of, is_study, member_of, register, sections, subject
from metalearn.schema.validate import validate

__all__ = [
    "GROUPS",
    "MEMBERS",
    "BadInput",
    "Key",
    "fields_of",
    "groups_of",
    "is_study",
    "member_of",
    "nearest",
    "register",
    "sections",
    "subject",
    "validate",
]
