"""`metalearn check grad`: options, printing, the certificate. Imports no torch until the command line is known good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metalearn import cells
from metalearn.ledger import CellDir, write_json
from metalearn.options import Parser
from metalearn.schema import BadInput, is_study

DESCRIPTION = """Check the outer gradient of a run before trusting it: on its own network, data, precision and keys.

  metalearn check grad [group=member] [key=value] ...     for example algorithm=maml backbone=conv4_mini

In float64, on a few of the run's own training tasks: the gradient against central differences of the outer objective
(from which first-order methods must differ), against a closed form where the algorithm has one, against first order,
against one task at a time and against the run's own precision. Prints a table, and writes certificate.json into the
run's folder, from where the run's result.json takes it over. Exit code 1 if a check fails."""


def parser() -> Parser:
    """The verb's options."""
    p = Parser("check", DESCRIPTION)
    p.add_argument("what", choices=("grad",), help="grad: the outer gradient")
    p.add_argument("overrides", nargs="*", help="groups and keys of the run, as for metalearn itself")
    p.add_argument("--tasks", type=int, default=2, metavar="B", help="training tasks to compute on; default 2")
    p.add_argument(
        "--directions",
        type=int,
        default=3,
        metavar="D",
        help="random directions of each group of parameters; default 3",
    )
    return p


def main(arguments: Sequence[str]) -> int:
    """Run the verb and return the exit code."""
    options = parser().parse_args(list(arguments))
    for name, least in (("tasks", 1), ("directions", 1)):
        if getattr(options, name) < least:
            raise BadInput(f"check: --{name} {getattr(options, name)}: must be >= {least}")
    for swept in cells.swept(options.overrides):
        raise BadInput(f"check: {swept}: names several runs; check one at a time")
    found = cells.expand(options.overrides)
    if len(found) != 1:
        raise BadInput(f"check: this names {len(found)} runs; check one at a time")
    if is_study(found[0].config):
        raise BadInput(f"check: study={found[0].config['study']['name']} trains nothing, so that it has no gradient")
    from metalearn.check.grad import check

    certificate = check(found[0], tasks=options.tasks, directions=options.directions)
    path = CellDir(found[0].config["output_dir"], found[0].cell_id).path / "certificate.json"
    write_json(path, certificate)
    print(table(certificate) + f"\n{path}")
    return 0 if certificate["passed"] else 1


def table(certificate: dict[str, Any]) -> str:
    """The checks as text."""
    about = certificate["about"]
    lines = [
        f"\n{about['algorithm']} on {about['dataset']} with {about['backbone']}: outer gradient of "
        f"{about['parameters']:,} meta-parameters, {about['tasks']} tasks, float64"
    ]
    rows = [("check", "relative difference", "bound", "")]
    for check in certificate["checks"]:
        value = "-" if check["value"] is None else f"{check['value']:.1e}"
        bound = "" if check["bound"] is None else f"{check['relation']} {check['bound']:.0e}"
        verdict = {True: "ok", False: "FAILED", None: check["why"]}[check["passed"]]
        rows.append((check["name"], value, bound, verdict))
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    lines += ["  ".join(c.ljust(w) for c, w in zip(r[:3], widths, strict=True)) + f"  {r[3]}" for r in rows]
    compared = [c for c in certificate["checks"] if c["name"].startswith(("central", "closed")) and c["passed"]]
    if certificate["passed"] and not compared:
        lines.append("passed, but nothing compared this gradient with a slope or a formula")
        return "\n".join(line.rstrip() for line in lines)
    lines.append("passed" if certificate["passed"] else "FAILED: do not trust numbers of this run")
    return "\n".join(line.rstrip() for line in lines)
