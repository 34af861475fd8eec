"""Copy a finished cell's small result files to docs/runs/, where documents quote them.

usage: python scripts/curate.py <cell folder> docs/runs/<experiment>/<name>

The data set's path is replaced by `<dataset.root>`: a result names data by its content hash.
"""

import json
import sys
from pathlib import Path

import pandas as pd


def curate(cell: Path, target: Path) -> None:
    """Copy result.json without paths of this machine, and the episodes at the last adaptation step (float32)."""
    result = json.loads((cell / "result.json").read_text())
    if "root" in result["config"]["dataset"]:
        result["config"]["dataset"]["root"] = "<dataset.root>"
    result["config"]["output_dir"] = "outputs"
    target.mkdir(parents=True, exist_ok=True)
    (target / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    episodes = pd.read_parquet(cell / "episodes.parquet")
    last = episodes[episodes["step"] == result["protocol"]["test_steps"]]
    small = last.astype({"episode": "int32", "step": "int16", "value": "float32", "loss": "float32"})
    small.to_parquet(target / "episodes.parquet", index=False, compression="zstd")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    curate(Path(sys.argv[1]), Path(sys.argv[2]))
