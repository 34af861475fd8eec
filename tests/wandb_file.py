"""Reads W&B's offline file: a LevelDB log of protobuf records (wandb 0.31)."""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

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


def read(path: Path) -> tuple[list[dict], dict]:
    """The logged history, and the run's id, group and tags."""
    history, about = [], {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            names = [(i.key or "/".join(i.nested_key), i.value_json) for i in record.history.item]
            history.append({name: json.loads(value) for name, value in names})
        elif kind == "run":
            about = {"id": record.run.run_id, "group": record.run.run_group, "tags": list(record.run.tags)}
    return history, about
