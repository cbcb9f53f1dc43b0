"""Write files into a hidden folder inside the target, and rename them once all are complete.

This needs only write permission in the target, so mount points, ".", and links to folders work; other files
in the target are not touched. The next save removes whatever a killed save leaves there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from torchao_mx.hf.files import CONFIG, WEIGHTS_KEY

_TOKEN = "[0-9a-f]{8}"
_PENDING = re.compile(rf"model-saving-({_TOKEN})(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# The second pattern is an adapter's folder from earlier versions.
_STAGE = re.compile(rf"\.torchao_mx-{_TOKEN}|\.adapter-[a-z0-9_]{{8}}")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def staging(path: str | Path, size: int) -> Iterator[Path]:
    """Yield a new folder inside ``path``; the caller fills it, then calls :func:`sync` and ``os.replace``.

    The folder is removed at the end. If ``path`` was created for it, an error removes ``path`` too.

    Args:
        path: the folder to write into, new or existing.
        size: the least number of bytes that will be written.

    Raises:
        ValueError: ``path`` is a file.
        OSError: it is not writable, has less than ``size`` bytes free, or another save is under way.
    """
    target = check_folder(path)
    made = [p for p in (target, *target.parents) if not p.exists()]
    try:
        with _naming("make the folder", target):
            target.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            clean(target)
            try:
                _check_space(target, size)
                stage = target / f".torchao_mx-{secrets.token_hex(4)}"
                with _naming("write into the folder", target):
                    stage.mkdir()
                yield stage
            finally:
                clean(target)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_folder(path: str | Path) -> Path:
    """Resolve links in ``path`` and check that it can be written into; nothing is written.

    Raises:
        ValueError: it is a file, or below one.
        OSError: it, or the folder to create it in, is not writable.
    """
    target = Path(os.path.realpath(path))
    present = target
    while not os.path.lexists(present):
        present = present.parent
    if not present.is_dir():
        raise ValueError(f"{present} is a file; give the folder to write into")
    # os.access rather than mode bits: on a read-only file system it is False for root too.
    if not os.access(
        present, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        raise PermissionError(
            errno.EACCES, "no permission to write into the folder; give another", str(present)
        )
    return target


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                "another save into this folder is under way; wait for it, or give another folder",
                str(folder),
            ) from None
        except OSError:  # a file system without such locks
            pass
        yield
    finally:
        os.close(descriptor)


def clean(folder: Path) -> None:
    """Remove leftovers of saves: hidden folders, and pending weights that config.json does not name."""
    try:
        token = _PENDING.fullmatch(json.loads((folder / CONFIG).read_text())[WEIGHTS_KEY])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        token = None
    for entry in list(folder.iterdir()):
        match = _PENDING.fullmatch(entry.name)
        if match and not (token and token[1] == match[1]):
            with contextlib.suppress(OSError):
                entry.unlink()
        elif _STAGE.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def pending_name(stage: Path, name: str) -> str:
    """The temporary name in the target of the file ``name`` in ``stage``."""
    token = stage.name.rpartition("-")[2]
    return name.replace("model", f"model-saving-{token}", 1)


def _check_space(folder: Path, size: int) -> None:
    usage = shutil.disk_usage(folder)
    if usage.total and size > usage.free:  # some file systems report nothing
        raise OSError(
            errno.ENOSPC,
            f"{size:,} bytes are needed and {usage.free:,} are free; make room, or give another folder",
            str(folder),
        )


@contextlib.contextmanager
def writing(file: Path, size: int = 0) -> Iterator[None]:
    """Make system errors tell what could not be written: ``file``, in a stage, of ``size`` bytes.

    Raises:
        OSError: replaces the system's or safetensors' error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code is None:  # safetensors gives it only in its text
            match = re.search(r"os error (\d+)", str(error))
            code = int(match[1]) if match else errno.EIO
        target = file.parent.parent
        what = f" ({size:,} bytes; {shutil.disk_usage(target).free:,} are free)" if size else ""
        room = "make room there, or " if code in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(
            code,
            f"{os.strerror(code)}: {file.name}{what} could not be written, and the folder is unchanged; "
            f"{room}give another folder",
            str(target),
        ) from error


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file in a stage, readable by everyone who can read its folder."""
    with writing(file, sum(tensor.nbytes for tensor in tensors.values())):
        save_file(tensors, file, metadata=metadata)
        file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes it private


def write_json(record: dict[str, Any], file: Path, sort_keys: bool = False) -> None:
    """Write and sync a JSON file in a stage."""
    with writing(file):
        file.write_text(json.dumps(record, indent=2, sort_keys=sort_keys) + "\n")
    sync(file)


@contextlib.contextmanager
def _naming(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: cannot {what}; give another", str(folder)
        ) from error


def sync(*paths: Path) -> None:
    """Flush files and folders to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not path.is_dir() or error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(descriptor)
