"""Help made from the schemas: every group, member and key with its type, default and range."""

from __future__ import annotations

from collections.abc import Sequence

from metalearn.composing import members
from metalearn.schema import GROUPS, MEMBERS, BadInput, fields_of, nearest
from metalearn.schema.groups import Run
from metalearn.schema.keys import Field
from metalearn.schema.registry import SINGLE

INTRO = """metalearn: train a meta-learning algorithm, test it on frozen episodes, keep the result.

  metalearn [group=member] [key=value] ...      one run
  metalearn -m key=a,b group=x,y ...            a sweep over the product
  metalearn experiment=<paper>/<id> [size=...]  a prepared sweep, or study; in the size that its file names so
  metalearn --cfg job [...]                     print the whole composed configuration
  metalearn --help <group>                      the keys of a group
  metalearn alpha [key=value] ...               what the inner learning rate should be, before any training
  metalearn check grad [key=value] ...          whether a run's outer gradient is right, on its own model and data
  metalearn bench [--help]                      how fast meta-steps are, beside other libraries
  metalearn sweep plan [...]                    what a sweep would cost, and the smallest differences it could show
  metalearn sweep status|run|repair [...]       where a sweep stands; submit what is missing, on SLURM or here
  metalearn figure [--help]                     a metric against a swept key, from results
  metalearn wandb push [key=value] ...          a sweep's W&B runs, rebuilt from the local files
  metalearn results [key=value] ...             finished results, filtered and listed
  metalearn table [<paper>/<table>] [...]       a paper's table with our results beside the published numbers
  metalearn report [NAME] [--help]              what papers prove, as measured numbers and pictures
  metalearn report experiment=<paper>/<id>      one HTML file about an experiment: figures, protocol, failures

groups and their members:"""


def usage(arguments: Sequence[str] = ()) -> str:
    """The overview, or the keys of one group."""
    if arguments:
        return _group(arguments[0])
    lines = [INTRO]
    for group in (*GROUPS, "experiment"):
        lines.append(f"  {group:<12} {', '.join(members(group)) or '(none yet)'}")
    lines += ["", "keys outside all groups:", *_keys("", fields_of(Run))]
    lines.append("\nexit codes: 0 done, 2 bad input, 3 diverged (recorded), 1 anything else")
    return "\n".join(lines)


def _group(group: str) -> str:
    if group not in GROUPS:
        raise BadInput(f"{group}: no such group{nearest(group, GROUPS)}")
    if group in SINGLE:
        return "\n".join(_keys(f"{group}.", fields_of(SINGLE[group])))
    blocks = []
    for target, schema in MEMBERS[group].items():
        blocks.append(f"{target}\n" + "\n".join(_keys(f"{group}.", fields_of(schema))))
    return "\n\n".join(blocks)


def _keys(prefix: str, fields: dict[str, Field]) -> list[str]:
    lines = []
    for name, field in fields.items():
        default = "required" if field.key.required else f"default {'null' if field.default is None else field.default}"
        lines.append(f"  {prefix}{name:<24} {field.key.doc}\n      {field.expected()}; {default}")
    return lines
