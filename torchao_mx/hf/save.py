"""save_pretrained: a model with packed experts as a checkpoint in gpt-oss's layout, whole or not at all.

Everything is written into a hidden folder inside the target first; :func:`_publish` then puts it in the old
checkpoint's place, in an order in which transformers finds one of the two complete at every instant.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from torchao_mx.hf.adapter import CONFIG_FILE as ADAPTER_CONFIG
from torchao_mx.hf.checkpoint import INDEX, SINGLE
from torchao_mx.hf.merge import MergeError, Update, merge, updates_of, warn_of_lost
from torchao_mx.hf.quantizer import MXQuantizationConfig
from torchao_mx.hf.staging import (
    CONFIG,
    WEIGHTS_KEY,
    check_folder,
    pending_name,
    save_tensors,
    staging,
    sync,
    writing,
)
from torchao_mx.hf.state import checked_state, stored

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# What a checkpoint in the target's place would otherwise leave behind.
_REPLACED = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|config\.json|generation_config\.json"
)
# What is not copied beside other weights: weights of whatever name and format, and what would change them.
_NOT_COPIED = re.compile(
    rf"\..*|.*\.(safetensors|bin|pth?|ckpt|gguf|h5|msgpack|onnx|onnx_data)(\.index\.json)?|{ADAPTER_CONFIG}"
)


def save_pretrained(
    model: PreTrainedModel,
    path: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    merge_adapters: bool = False,
) -> dict[str, MergeError]:
    """Save a gpt-oss model as published ones are: experts in MXFP4 blocks and scales, the rest as it is.

    Stock transformers of both versions loads the folder, where it dequantizes to the values of
    ``MXTensor.dequantize()`` bit for bit; so does :func:`from_pretrained`, to the same bytes. Other files of
    an existing folder, such as a tokenizer's, stay. On any error the folder is as it was; if the process is
    killed, the old checkpoint loads or the new one, and the next save removes what is left. How weights
    quantize their activations (``MXTensor.activation``) is not part of the layout, nor are packed linear
    layers: their values are written unpacked.

    Args:
        model: every expert weight an MXFP4 :class:`MXTensor`, from :func:`from_pretrained` or converted after
            quantization-aware training; no adapters but with ``merge_adapters``.
        path: the folder to write, new or existing.
        max_shard_size: of a file, in bytes, or as "5GB"; a tensor is never split.
        merge_adapters: add the adapters of :class:`MXLoRAExperts` and :class:`MXLoRALinear` to what is
            written, as :func:`merge_adapter` does, one weight at a time; into linear layers unpacked, in the
            weight's logical dtype.
            The model itself stays as it is.

    Returns:
        What rounding cost, by the full name of each weight with merged adapters; empty where there are none.
        **Small updates vanish in 4 bits**: see :class:`MergeError` before serving the result. Weights that
        lost theirs are warned of.

    Raises:
        TypeError: the model is wrapped in another, of PEFT say.
        NotImplementedError: the model has no experts that the layout is for.
        ValueError: a tensor that the layout has no place for or that could not be loaded again, each named;
            adapters that overflow; ``max_shard_size`` is no size, or ``path`` a file; with
            ``merge_adapters``, a folder with an adapter; a generation config that transformers refuses.
        OSError: the folder may not be written into, has no room, or another save into it is under way.

    Example::

        model = from_pretrained("openai/gpt-oss-20b")
        save_pretrained(model, "gpt-oss-20b-tuned")
    """
    limit = bytes_of(max_shard_size)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it is transformers' own, as from_pretrained gives: take it "
            f"out of what wraps it, of PEFT's adapters by unload()"
        )
    check_target(path, merge_adapters)
    return save_model(model, path, limit, updates_of(model) if merge_adapters else {})


def save_model(
    model: PreTrainedModel,
    path: str | Path,
    limit: int,
    updates: dict[str, Update],
    others: Path | None = None,
) -> dict[str, MergeError]:
    """:func:`save_pretrained` with ``updates`` merged, and files as those of the folder ``others`` beside."""
    state = checked_state(model, updates)
    sizes = {k: t.nbytes for name, tensor in state.items() for k, t in stored(name, tensor).items()}
    errors: dict[str, MergeError] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in state.items():
            if name in updates:
                tensor, errors[name] = merge(updates[name])
            elif tensor.is_meta:
                tensor = model.get_parameter(name).dequantize()
            yield from stored(name, tensor).items()

    with replacing(path, sum(sizes.values())) as folder:
        _write_configs(model, folder)
        if others is not None:
            copy_others(others, folder)
        write_tensors(sizes, tensors(), folder, limit, "Saving")
    warn_of_lost(errors)
    return errors


@contextlib.contextmanager
def replacing(path: str | Path, size: int) -> Iterator[Path]:
    """A new folder to be filled with a checkpoint, of ``size`` bytes of weights, which then goes to ``path``.

    On an error ``path`` is as it was. The weights take longest, so that what may fail is written before them.

    Raises:
        ValueError, OSError: as :func:`check_target`; too little room; another save into it is under way.
    """
    target = check_target(path)
    _restore(target)
    with staging(target, size) as stage:
        yield stage
        _publish(stage)
    _remove_siblings(target)


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


def bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size).upper())
    limit = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if isinstance(size, bool) or limit <= 0:
        raise ValueError(f"max_shard_size={size!r} is no size; give bytes, or a text such as '5GB'")
    return limit


def write_tensors(
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    limit: int,
    what: str,
) -> None:
    """Write ``tensors``, of these names in this order and of ``sizes`` in bytes, drawn a shard at a time."""
    shards = _split(sizes, limit)
    names = [SINGLE]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    total, stream = sum(sizes.values()), iter(tensors)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as progress:
        for name, shard in zip(names, shards, strict=True):
            held = {}
            for key, tensor in itertools.islice(stream, len(shard)):
                # A copy unless it is contiguous and on the CPU.
                held[key] = tensor.to("cpu").contiguous()
                progress.update(tensor.nbytes)
            save_tensors(held, folder / name, {"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_index(folder / INDEX, total, places)


def _write_index(file: Path, total: int, places: dict[str, str]) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    with writing(file):
        file.write_text(json.dumps(index, indent=2) + "\n")


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut where a shard would pass ``limit`` bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    config: Any = copy.deepcopy(model.config)
    loaded = getattr(config, "quantization_config", None)
    unpacked = getattr(loaded, "modules_to_not_convert", None)
    config.quantization_config = MXQuantizationConfig(modules_to_not_convert=unpacked).to_dict()
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    with writing(folder / CONFIG):
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def copy_others(source: Path, folder: Path) -> None:
    """Copy a checkpoint's files beside its weights, such as a tokenizer's, that ``folder`` has not."""
    for file in source.iterdir():
        copied = folder / file.name
        if file.is_file() and not copied.exists() and not _NOT_COPIED.fullmatch(file.name):
            size = file.stat().st_size
            with file.open("rb") as stream, writing(copied, size), copied.open("wb") as out:
                shutil.copyfileobj(stream, out)


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
        places = {key: pending_name(stage, name) for key, name in record["weight_map"].items()}
        file = stage / pending_name(stage, INDEX)
        _write_index(file, record["metadata"]["total_size"], places)
        sync(file)
        os.replace(file, target / file.name)
    record = json.loads((stage / CONFIG).read_text())
    record[WEIGHTS_KEY] = pending_name(stage, INDEX if index.is_file() else SINGLE)
    switch = stage / f"pending-{CONFIG}"
    with writing(switch):
        switch.write_text(json.dumps(record, indent=2) + "\n")
    sync(switch)
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


def _restore(target: Path) -> None:
    """Put back the checkpoint that an earlier version had moved away when it was killed."""
    if not target.exists():
        for folder in _siblings(target):
            if folder.name.endswith(".old"):
                folder.rename(target)


def _remove_siblings(target: Path) -> None:
    for folder in _siblings(target):
        shutil.rmtree(folder, ignore_errors=True)
