"""From the sections of a configuration to the objects that they describe."""

from importlib import import_module
from typing import Any

NOT_ARGUMENTS = (
    *("_target_", "name", "bn_modes", "outer", "outer_vector", "outer_clip", "outer_drop"),
    *("pretrain_steps", "pretrain_schedule", "pretrained", "network_size", "threads"),
)
"""Keys that no constructor takes."""


def build(group: str, section: dict[str, Any], **more: Any) -> Any:
    """The object that a group's section describes: its `_target_`, called with its other keys and with `more`."""
    module, name = section["_target_"].rsplit(".", 1)
    arguments = {k: v for k, v in section.items() if k not in NOT_ARGUMENTS}
    return getattr(import_module(module), name)(**arguments, **more)
