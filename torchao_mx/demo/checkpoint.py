"""Files of a run: written whole or not at all, read back without unpickling code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not what its place asks for; the exit code is 1."""


def save(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` (tensors and plain values) so that ``path`` is never half written."""
    _write_atomically(path, lambda file: torch.save(record, file))


def load(path: Path, what: str, names: frozenset[str]) -> dict[str, Any]:
    """Read a record of exactly ``names`` onto the CPU, with ``weights_only=True``.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is not ``what`` was asked for.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch.load raises many types for a damaged file
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({first_line(error)})"
        ) from error
    if not isinstance(record, dict) or set(record) != names:
        raise CheckpointError(f"{path}: a torch file, but not {what} of this demo")
    return record


def first_line(error: Exception) -> str:
    """Of its message, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    _write_atomically(path, lambda file: file.write(text.encode()))


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
