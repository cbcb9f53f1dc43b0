"""save_pretrained: a model with packed experts as a checkpoint in gpt-oss's layout, whole or not at all.

Everything is written into a new folder beside the target, which then takes the target's name. Should the
process die between the two renames, what was there before is complete in ``.NAME.old``.
"""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from torchao_mx.hf._checkpoint import INDEX, SINGLE
from torchao_mx.hf._layout import UNPACKED_MODULES
from torchao_mx.hf._state import packed_state_dict

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# What a checkpoint in the target's place would otherwise leave behind.
_REPLACED = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|config\.json|generation_config\.json"
)


def save_pretrained(
    model: PreTrainedModel, path: str | Path, *, max_shard_size: int | str = "5GB"
) -> None:
    """Save a gpt-oss model as published ones are: experts in MXFP4 blocks and scales, the rest as it is.

    Stock transformers of both versions loads the folder, where it dequantizes to the values of
    ``MXTensor.dequantize()`` bit for bit; so does :func:`from_pretrained`, to the same bytes. Other files of
    an existing folder, such as a tokenizer's, stay. On any error the folder is as it was. How weights
    quantize their activations (``MXTensor.activation``) is not part of the layout.

    Args:
        model: every expert weight an MXFP4 :class:`MXTensor`, from :func:`from_pretrained` or converted after
            quantization-aware training; no adapters.
        path: the folder to write, new or existing.
        max_shard_size: of a file, in bytes, or as "5GB"; a tensor is never split.

    Raises:
        TypeError: the model is wrapped in another, of PEFT say.
        NotImplementedError: the model has no experts that the layout is for.
        ValueError: a tensor that the layout has no place for or that could not be loaded again, each named;
            ``max_shard_size`` is no size, or ``path`` a file.

    Example::

        model = from_pretrained("openai/gpt-oss-20b")
        save_pretrained(model, "gpt-oss-20b-tuned")
    """
    limit = _bytes_of(max_shard_size)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it is transformers' own, as from_pretrained gives: take it "
            f"out of what wraps it, of PEFT's adapters by unload()"
        )
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give the folder to write into")
    state = packed_state_dict(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        _write_tensors(state, temporary, limit)
        _write_configs(model, temporary)
        if target.exists():
            _keep_others(target, temporary)
        _sync(temporary)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size).upper())
    limit = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if isinstance(size, bool) or limit <= 0:
        raise ValueError(f"max_shard_size={size!r} is no size; give bytes, or a text such as '5GB'")
    return limit


def _write_tensors(state: dict[str, torch.Tensor], folder: Path, limit: int) -> None:
    shards = _split(state, limit)
    names = [SINGLE]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    total = sum(t.nbytes for t in state.values())
    with tqdm(total=total, desc="Saving", unit="B", unit_scale=True, disable=None) as progress:
        for name, shard in zip(names, shards, strict=True):
            # Copies of one shard at a time; contiguous ones already on the CPU are not copied.
            tensors = {key: state[key].to("cpu").contiguous() for key in shard}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            progress.update(sum(t.nbytes for t in tensors.values()))
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(state: dict[str, torch.Tensor], limit: int) -> list[list[str]]:
    """Names in their order, cut where a shard would pass ``limit`` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    config: Any = copy.deepcopy(model.config)
    loaded = getattr(config, "quantization_config", None)
    unpacked = getattr(loaded, "modules_to_not_convert", None) or UNPACKED_MODULES
    config.quantization_config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": list(unpacked),
    }
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _keep_others(target: Path, temporary: Path) -> None:
    """What is in ``target`` and not part of a checkpoint, as further links to the same files; its mode."""
    shutil.copymode(target, temporary)
    for entry in target.iterdir():
        if _REPLACED.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, temporary / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, temporary / entry.name)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination, follow_symlinks=False)


def _sync(folder: Path) -> None:
    for file in (*folder.iterdir(), folder):
        if file.is_file() or file == folder:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _replace(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        raise ValueError(
            f"{old} is there, what an interrupted save had replaced; restore it as {target.name} or remove it"
        )
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
