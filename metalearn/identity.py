"""What names a run: the keys that make its result what it is, and the contents of its data. Imports no torch."""

import hashlib
import json
from typing import Any

from metalearn.schema import Key, fields_of, is_study, member_of, sections
from metalearn.schema.groups import Run

Config = dict[str, Any]


def data_hash_of(config: Config) -> str:
    """Names the data by their contents; empty for a study, which draws its own."""
    return "" if is_study(config) else member_of("dataset", config["dataset"]).data_hash(config["dataset"])


def contents_of(config: Config) -> dict[str, str]:
    """Content hashes of the source files that a run's factories lie in."""
    found = [(path, member_of(group, section), section) for path, group, section in sections(config)]
    return {f"{path}.content": schema.content(section) for path, schema, section in found if hasattr(schema, "content")}


def identity(config: Config, data_hash: str, contents: dict[str, str] | None = None) -> tuple[Config, Config]:
    """What names a run: the `train` and the `test` keys that differ from their declared defaults.

    Epochs and targets of all members enter, the data's content hash in place of its path, and the content hashes of
    source files that keys name.
    """
    found: dict[str, Config] = {"train": {"dataset.data": data_hash, "engine.epoch": Run.epoch}, "test": {}, "none": {}}
    found["train"] |= contents or {}
    for name, field in fields_of(Run).items():
        _note(found, name, field.key, config[name], field.default)
    for path, group, section in sections(config):
        schema = member_of(group, section)
        if "_target_" in section:
            found["train"][f"{path}._target_"] = section["_target_"]
        found["train"][f"{path}.epoch"] = schema.epoch
        for name, field in fields_of(schema).items():
            if name != "root" and not field.key.sections:
                _note(found, f"{path}.{name}", field.key, section[name], field.default)
    return found["train"], found["test"]


def _note(found: dict[str, Config], path: str, key: Key, value: Any, default: Any) -> None:
    if key.first_touches is not None and value[:1] != default[:1]:
        found[key.first_touches][f"{path}.0"] = value[0]
    if value != default:
        found[key.touches][path] = value


def short_hash(value: Any) -> str:
    """The first 12 hex digits of `config_hash`."""
    return config_hash(value)[:12]


def config_hash(value: Any) -> str:
    """sha256 of the canonical JSON of plain data, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
