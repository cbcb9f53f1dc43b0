"""Replace a checkpoint with a new one; at every instant transformers finds one of the two complete.

The new checkpoint is written to a hidden folder inside the target. :func:`replacing` then moves its files
into the target in an order with a single moment of change: the ``os.replace`` of config.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from torchao_mx.hf.files import ADAPTER_CONFIG, CONFIG, INDEX, SINGLE, WEIGHTS_KEY
from torchao_mx.hf.staging import check_folder, pending_name, staging, sync, write_json, writing

# Files of an old checkpoint, which the new one replaces or removes.
_REPLACED = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|config\.json|generation_config\.json"
)


@contextlib.contextmanager
def replacing(path: str | Path, size: int) -> Iterator[Path]:
    """Yield a folder to fill with a checkpoint of ``size`` bytes of weights; it then replaces ``path``.

    On any error ``path`` stays unchanged. Weights take longest, so write whatever may fail before them.

    Raises:
        ValueError, OSError: as :func:`check_target`; too little space; another save into it is under way.
    """
    target = check_target(path)
    for folder in () if target.exists() else _siblings(target):
        if folder.name.endswith(".old"):  # moved away by an earlier version that was then killed
            folder.rename(target)
    with staging(target, size) as stage:
        yield stage
        _publish(stage)
    for folder in _siblings(target):
        shutil.rmtree(folder, ignore_errors=True)


def check_target(path: str | Path, merged: bool = False) -> Path:
    """Resolve links; refuse a folder that cannot take a checkpoint or, with ``merged``, merged adapters.

    Raises:
        ValueError: it is a file, or has a folder in place of a checkpoint's file; with ``merged``, it has an
            adapter, which would be added a second time.
        OSError: it is not writable.
    """
    target = check_folder(path)
    for entry in target.iterdir() if target.exists() else ():
        if _REPLACED.fullmatch(entry.name) and entry.is_dir():
            raise ValueError(f"{entry} is a folder in place of a checkpoint's file; remove it")
    if merged and (target / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{path} has an {ADAPTER_CONFIG}, and transformers would add that adapter to the merged weights; "
            f"give another folder"
        )
    return target


def _publish(stage: Path) -> None:
    """Replace the checkpoint in the parent of ``stage`` with that in ``stage``; one of the two always loads.

    The new weights first get pending names beside the old ones. The switch replaces config.json with one that
    names them by transformers' own key. Nothing reads the usual names now; they are replaced one by one, and
    finally config.json by the one without the key. If the target had no config.json, nothing could be loaded
    from it, and writing config.json is the switch.
    """
    target = stage.parent
    files = sorted(file.name for file in stage.iterdir())
    sync(*(stage / name for name in files), stage)
    if (target / CONFIG).is_file():
        switch = _pending_config(stage)
        sync(target)
        os.replace(switch, target / CONFIG)
        sync(target)
    for name in files:
        if name != CONFIG:
            os.replace(stage / name, target / name)
    for entry in list(target.iterdir()):
        if _REPLACED.fullmatch(entry.name) and entry.name not in files:
            entry.unlink()
    sync(target)
    os.replace(stage / CONFIG, target / CONFIG)
    sync(target)


def _pending_config(stage: Path) -> Path:
    """Give the weights their pending names; return a config that names them, to replace the old one."""
    target, index = stage.parent, stage / INDEX
    for file in stage.glob("*.safetensors"):
        with writing(stage / pending_name(stage, file.name), file.stat().st_size):
            _link(file, target / pending_name(stage, file.name))
    if index.is_file():
        record = json.loads(index.read_text())
        places = record["weight_map"]
        record["weight_map"] = {key: pending_name(stage, name) for key, name in places.items()}
        file = stage / pending_name(stage, INDEX)
        write_json(record, file)
        os.replace(file, target / file.name)
    record = json.loads((stage / CONFIG).read_text())
    record[WEIGHTS_KEY] = pending_name(stage, INDEX if index.is_file() else SINGLE)
    switch = stage / f"pending-{CONFIG}"
    write_json(record, switch)
    return switch


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, destination)
        sync(destination)


def _siblings(target: Path) -> list[Path]:
    """Folders beside ``target`` where earlier versions, when killed, left an old or unfinished checkpoint."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(old|[0-9a-f]{{8}})")
    try:
        found = [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]
        return [entry for entry in found if not entry.is_symlink() and _is_ours(entry)]
    except OSError:  # not readable
        return []


def _is_ours(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else ["a file"]
    return not names or any(map(_REPLACED.fullmatch, names))
