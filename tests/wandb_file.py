"""Reads W&B's offline file: a LevelDB log of protobuf records (wandb 0.31)."""

import json
import struct
import time
from pathlib import Path
from typing import NamedTuple

from wandb.proto.wandb_internal_pb2 import Record, RunRecord

BLOCK, HEADER = 32768, 7


def records(path: Path):
    """The records of the file, joined over their fragments."""
    data = path.read_bytes()
    assert data[:4] == b":W&B" and struct.unpack("<H", data[4:6])[0] == 0xBEE1
    position, whole = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        whole += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # full, or last of several
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


class Mirrored(NamedTuple):
    """What a file says of its run: its record, rows by W&B's step, configuration, summary, and how it ended."""

    run: RunRecord
    history: dict[int, dict]
    config: dict
    summary: dict
    exit_code: int | None


def read(path: Path) -> Mirrored:
    """Everything, put together as W&B's server would."""
    run, history, config, summary, code = None, {}, {}, {}, None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = _values(record.history.item)
            history.setdefault(row["_step"], {}).update(row)
        elif kind == "run":
            run = record.run
            config |= _values(run.config.update)
        elif kind == "config":
            config |= _values(record.config.update)
        elif kind == "summary":
            summary |= _values(record.summary.update)
        elif kind == "exit":
            code = record.exit.exit_code
    config.pop("_wandb", None)
    return Mirrored(run, history, config, summary, code)


def read_ended(path: Path, seconds: float = 20.0) -> Mirrored:
    """`read`, once the run's end is in the file: W&B's process may write later than we hear, on a busy machine."""
    until = time.monotonic() + seconds
    while (found := read(path)).exit_code is None and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _values(items) -> dict:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
