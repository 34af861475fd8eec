"""`metalearn sweep`: what a sweep would cost, where it stands, and what is missing. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from metalearn.schema import BadInput
from metalearn.schema.keys import nearest

ACTIONS: dict[str, str] = {
    "plan": "metalearn.sweep.plan",
    "status": "metalearn.sweep.status",
    "run": "metalearn.sweep.run",
    "repair": "metalearn.sweep.repair",
}
"""The module of each action, whose `main(arguments)` returns the exit code and whose TITLE is its line in the help."""


def usage() -> str:
    """The list of actions."""
    lines = [
        "usage: metalearn sweep ACTION [options] [group=member] [key=value] ...; metalearn sweep ACTION --help",
        "",
    ]
    lines += [f"  {name:<8} {importlib.import_module(module).TITLE}" for name, module in ACTIONS.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the action that the arguments name, or list all."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] not in ACTIONS:
        raise BadInput(f"sweep: {arguments[0]}: must be one of {', '.join(ACTIONS)}{nearest(arguments[0], ACTIONS)}")
    return int(importlib.import_module(ACTIONS[arguments[0]]).main(arguments[1:]))
