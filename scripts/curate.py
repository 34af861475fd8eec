"""Copy a finished cell's small result files to docs/runs/, where documents quote them.

usage: python scripts/curate.py <cell folder> docs/runs/<experiment>/<name>

The data set's path is replaced by `<dataset.root>`: a result names data by its content hash.
"""

import json
import shutil
import sys
from pathlib import Path


def curate(cell: Path, target: Path) -> None:
    """Copy result.json (without paths of this machine) and episodes.parquet."""
    result = json.loads((cell / "result.json").read_text())
    if "root" in result["config"]["dataset"]:
        result["config"]["dataset"]["root"] = "<dataset.root>"
    result["config"]["output_dir"] = "outputs"
    target.mkdir(parents=True, exist_ok=True)
    (target / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.copy(cell / "episodes.parquet", target / "episodes.parquet")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    curate(Path(sys.argv[1]), Path(sys.argv[2]))
