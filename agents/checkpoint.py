"""Checkpoints that survive a kill at any moment: written aside and renamed, with a digest, the last two kept."""

from __future__ import annotations

import hashlib
import io
import os
import random
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmsched_gym.agents.run_folder import checkpoints
from llmsched_gym.files import replace_file

_DIGEST = hashlib.sha256().digest_size
KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (numbers, text, tensors, arrays, in dicts and lists) as the checkpoint of `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(_pack(state), buffer)
    data = zlib.compress(buffer.getvalue(), 1)
    path = folder / f"checkpoint-{step:012d}"

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
            file.flush()
            os.fsync(file.fileno())

    replace_file(path, write)
    for stale in [*checkpoints(folder)[KEPT:], *folder.glob(".checkpoint-*")]:
        stale.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint; a damaged one is passed over with a warning. None: there is none."""
    for path in checkpoints(folder):
        data = path.read_bytes()
        if len(data) > _DIGEST and hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
            return _unpack(torch.load(io.BytesIO(zlib.decompress(data[_DIGEST:])), weights_only=True))
        warnings.warn(f"{path}: damaged checkpoint, using the one before", stacklevel=2)
    return None


def cut_events(folder: Path, step: int) -> None:
    """Leave out of the run's TensorBoard events those after `step`, which will be written again."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in sorted(folder.glob("events.out.tfevents.*")):
        records = list(RawEventFileLoader(str(path)).Load())  # up to where a kill cut it off

        def write(partial: Path, records: list[bytes] = records) -> None:
            with open(partial, "wb") as file:
                writer = RecordWriter(file)
                for record in records:
                    if Event.FromString(record).step <= step:
                        writer.write(record)

        replace_file(path, write)


def _pack(value: Any) -> Any:
    """Arrays as tensors of bytes, so that reading needs no pickled classes."""
    if isinstance(value, np.ndarray):
        data = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.nbytes else torch.zeros(0)
        if value.dtype.fields is not None:
            return {"__array__": data, "record": value.dtype.itemsize, "shape": list(value.shape)}
        return {"__array__": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, dict):
        return {k: _pack(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v) for v in value]
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and "__array__" in value:
        dtype = np.dtype(value["dtype"]) if "dtype" in value else np.dtype((np.void, value["record"]))
        return np.frombuffer(value["__array__"].numpy().tobytes(), dtype).reshape(value["shape"]).copy()
    if isinstance(value, dict):
        return {k: _unpack(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v) for v in value]
    return value


def random_state() -> dict[str, Any]:
    """The global generators that SB3 and torch draw from."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys), int(position), int(has_gauss), float(gauss)],  # type: ignore[arg-type]
        "python": [version, list(internal), following],
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
