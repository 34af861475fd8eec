"""`metalearn sweep repair`: why cells have no result, and another try for those that may get one. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from metalearn.options import whole
from metalearn.sweep.run import parser, submit
from metalearn.sweep.standing import Standing

TITLE = "say why cells failed or were killed, and submit them again"
DESCRIPTION = f"""{TITLE}.

  metalearn sweep repair experiment=<paper>/<id> [--max-attempts 3] [hydra/launcher=slurm ...] [key=value ...]

Killed cells go on from their last checkpoint, failed ones too: what failed for a passing reason (a full disk, a lost
node) succeeds, a fault of the program fails again. A cell that has failed as often as --max-attempts says is left
alone; being preempted or killed does not count. Give what was short in the same command, for example
hydra.launcher.mem_gb=16. Diverged cells have a result and are not run again (rerun=true does that)."""


def main(arguments: Sequence[str]) -> int:
    """Submit killed and failed cells."""
    p = parser("sweep repair", DESCRIPTION)
    p.add_argument("--max-attempts", type=whole(1), default=3, metavar="N", help="default 3; failures of a cell")
    most = p.parse_intermixed_args(list(arguments)).max_attempts

    def wanted(s: Standing) -> bool:
        if s.state in ("failed", "killed"):
            print(f"{s.cell.cell_id}  {s.state} (attempt {s.attempt})  {' '.join(s.why.split())[:300]}")
        return s.state == "killed" or (s.state == "failed" and s.failures < most)

    left = {
        "failed": f"failed {most} times or more; --max-attempts allows more",
        "missing": "metalearn sweep run submits them",
    }
    return submit(p, arguments, wanted, left)
