"""A new checkpoint in the old one's place: at every instant transformers finds one of the two complete.

The new one is filled into a hidden folder inside the target. :func:`replacing` then puts its files there, in
an order with one moment of change: the ``os.replace`` of config.json.
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

# What a checkpoint in the target's place would otherwise leave there.
_REPLACED = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|config\.json|generation_config\.json"
)


@contextlib.contextmanager
def replacing(path: str | Path, size: int) -> Iterator[Path]:
    """A new folder to be filled with a checkpoint, of ``size`` bytes of weights, which then goes to ``path``.

    On an error ``path`` is as it was. The weights take longest, so that what may fail is written before them.

    Raises:
        ValueError, OSError: as :func:`check_target`; too little room; another save into it is under way.
    """
    target = check_target(path)
    for folder in () if target.exists() else _siblings(target):
        if folder.name.endswith(".old"):  # an earlier version had moved it away when it was killed
            folder.rename(target)
    with staging(target, size) as stage:
        yield stage
        _publish(stage)
    for folder in _siblings(target):
        shutil.rmtree(folder, ignore_errors=True)


def check_target(path: str | Path, merged: bool = False) -> Path:
    """The folder behind links; refuse one into which no checkpoint, or none with ``merged`` adapters, can go.

    Raises:
        ValueError: it is a file, or has a folder in a file's place; it has an adapter, which would be added a
            second time.
        OSError: it may not be written into.
    """
    target = check_folder(path)
    for entry in target.iterdir() if target.exists() else ():
        if _REPLACED.fullmatch(entry.name) and entry.is_dir():
            raise ValueError(f"{entry} is a folder in the place of a checkpoint's file; remove it")
    if merged and (target / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{path} has an {ADAPTER_CONFIG}, and transformers would load that adapter over the merged "
            f"weights; give another folder"
        )
    return target


def _publish(stage: Path) -> None:
    """Put the checkpoint in ``stage`` in the place of its parent's; at every instant one of the two loads.

    The new weights get names of their own beside the old ones. Replacing config.json with one that names them
    by transformers' own key is the switch. The usual names, which nothing reads now, are replaced one by one,
    and config.json last, by the one without the key. Where there was none, there was nothing to load, and
    writing it is the switch.
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
    """A config for weights under their pending names, which they get; to be put in the old one's place."""
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
    """Where earlier versions, if killed, left the old checkpoint or an unfinished one, beside ``target``."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(old|[0-9a-f]{{8}})")
    try:
        found = [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]
        return [entry for entry in found if not entry.is_symlink() and _is_ours(entry)]
    except OSError:  # not readable
        return []


def _is_ours(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else ["a file"]
    return not names or any(map(_REPLACED.fullmatch, names))
