"""Copy finished cells' small result files to docs/runs/, where documents quote them.

usage: python scripts/curate.py <cell folder> docs/runs/<experiment>/<name>
       python scripts/curate.py <output_dir> docs/runs/<experiment> [--by key,key] [--log] key=value [key=value ...]

The second form takes every finished cell under output_dir whose configuration has these values (as text), and names it
by the algorithm (or study), the values of --by, and the seed: maml/seed0, tsa_maml-m3/seed0. Two cells of one name
are refused. --log takes the training log, too, for curves over meta-steps. The data set's path is replaced by
`<dataset.root>`: a result names data by its content hash.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from metalearn.results import find, matches, value
from metalearn.schema import subject
from metalearn.schema.keys import show


def curate(cell: Path, target: Path, log: bool) -> None:
    """Copy result.json without paths of this machine, and the episodes at the last adaptation step (float32)."""
    result = json.loads((cell / "result.json").read_text())
    if "root" in result["config"].get("dataset", {}):
        result["config"]["dataset"]["root"] = "<dataset.root>"
    result["config"]["output_dir"] = "outputs"
    target.mkdir(parents=True, exist_ok=True)
    (target / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    episodes = pd.read_parquet(cell / "episodes.parquet")
    last = episodes[episodes["step"] == result["protocol"]["test_steps"]]
    small = last.astype({"episode": "int32", "step": "int16", "value": "float32", "loss": "float32"})
    small.to_parquet(target / "episodes.parquet", index=False, compression="zstd")
    for name in ("analysis.json", *(["metrics.jsonl"] if log else [])):
        if (cell / name).exists():
            (target / name).write_bytes((cell / name).read_bytes())


def collect(output: Path, target: Path, by: list[str], wanted: dict[str, str], log: bool) -> None:
    """Curate all cells with the wanted values."""
    taken: dict[str, Path] = {}
    for result in find(output / "runs"):
        config = result.config
        if not matches(config, wanted):
            continue
        marks = [f"{k.rsplit('.', 1)[1]}{show(v)}" for k in by if (v := value(config, k)) is not None]
        name = "-".join([subject(config)[0], *marks]) + f"/seed{config['seed']}"
        if name in taken:
            sys.exit(f"{name}: both {taken[name]} and {result.folder} have these values; add key=value or --by")
        taken[name] = result.folder
    for name, cell in taken.items():
        curate(cell, target / name, log)
    print(f"{len(taken)} cells in {target}")


def main() -> None:
    """See the module's docstring."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path)
    p.add_argument("target", type=Path)
    p.add_argument("--by", default="", help="keys that name a cell, besides algorithm and seed")
    p.add_argument("--log", action="store_true", help="take metrics.jsonl, too")
    p.add_argument("wanted", nargs="*", metavar="key=value")
    options = p.parse_intermixed_args()
    if (options.source / "result.json").exists():
        curate(options.source, options.target, options.log)
    else:
        wanted = dict(w.split("=", 1) for w in options.wanted)
        collect(options.source, options.target, [k for k in options.by.split(",") if k], wanted, options.log)


if __name__ == "__main__":
    main()
