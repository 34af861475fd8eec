"""Print a Markdown table of the results below a folder: python scripts/show_runs.py docs/runs/<experiment>."""

import json
import sys
from pathlib import Path


def rows(folder: Path) -> list[list[str]]:
    """One row for each result and batch-norm mode, at the last adaptation step; other steps of the headline follow."""
    out = []
    for path in sorted(folder.rglob("result.json")):
        result = json.loads(path.read_text())
        protocol = result["protocol"]
        for name, m in result["metrics"].items():
            metric, _, rest = name.partition("@")
            where = dict(q.split("=", 1) for q in rest.split(",") if q)
            scale = 100 if metric == "accuracy" else 1
            out.append(
                [
                    path.parent.relative_to(folder).as_posix(),
                    metric,
                    where.get("bn", protocol["bn"]),
                    where.get("step", str(protocol["test_steps"])),
                    f"{scale * m['mean']:.2f} +- {scale * m['ci95']:.2f}",
                    str(m["n"]),
                    str(result["steps"]),
                    f"{result['seconds']:.0f}",
                ]
            )
    return sorted(out, key=lambda r: (r[0], r[2], int(r[3])))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("| run | metric | bn | step | mean and 95 % interval (tasks) | n | meta-steps | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows(Path(sys.argv[1])):
        print("| " + " | ".join(row) + " |")
