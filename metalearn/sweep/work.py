"""`python -m metalearn.sweep.work work.json`: the process that runs cells where there is no queue."""

import sys
from pathlib import Path

from metalearn.cli import work
from metalearn.ledger import read_json

if __name__ == "__main__":
    given = read_json(Path(sys.argv[1]))
    sys.exit(work(given["cells"], given["flags"]))
