"""save_pretrained: a model with packed experts as a checkpoint in gpt-oss's layout, whole or not at all.

Everything is written into a new folder beside the target, which then takes the target's name. Should the
process die between the two renames, what was there before is complete in ``.NAME.old``.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from torchao_mx.hf._adapter import CONFIG_FILE as ADAPTER_CONFIG
from torchao_mx.hf._checkpoint import INDEX, SINGLE
from torchao_mx.hf._merge import MergeError, Update, merge, updates_of
from torchao_mx.hf._quantizer import MXQuantizationConfig
from torchao_mx.hf._state import checked_state, stored

CONFIG = "config.json"
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
    an existing folder, such as a tokenizer's, stay. On any error the folder is as it was. How weights
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
        **Small updates vanish in 4 bits**: see :class:`MergeError` before serving the result.

    Raises:
        TypeError: the model is wrapped in another, of PEFT say.
        NotImplementedError: the model has no experts that the layout is for.
        ValueError: a tensor that the layout has no place for or that could not be loaded again, each named;
            adapters that overflow; ``max_shard_size`` is no size, or ``path`` a file; with
            ``merge_adapters``, a folder with an adapter.

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

    with replacing(path) as folder:
        write_tensors(sizes, tensors(), folder, limit, "Saving")
        _write_configs(model, folder)
        if others is not None:
            copy_others(others, folder)
    return errors


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new folder, which is to be filled and then takes the place of ``path``; on an error that stays.

    Raises:
        ValueError: as :func:`check_target`; an interrupted save left its folder behind.
    """
    target = Path(path).resolve()
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            _keep_others(target, temporary)
        _sync(temporary)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: str | Path, merged: bool = False) -> None:
    """Refuse a folder into which no checkpoint, or none with ``merged`` adapters, can be saved.

    Raises:
        ValueError: it is a file; it has an adapter, which would be added a second time.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{path} is a file; give the folder to write into")
    if merged and (Path(path) / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{path} has an {ADAPTER_CONFIG}, and transformers would load that adapter over the merged "
            f"weights; give another folder"
        )


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
            save_file(held, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def copy_others(source: Path, folder: Path) -> None:
    """Copy a checkpoint's files beside its weights, such as a tokenizer's, that ``folder`` has not."""
    for file in source.iterdir():
        copied = folder / file.name
        if file.is_file() and not copied.exists() and not _NOT_COPIED.fullmatch(file.name):
            shutil.copyfile(file, copied)


def _keep_others(target: Path, temporary: Path) -> None:
    """What is in ``target`` alone and not part of a checkpoint, linked to the same files; its mode."""
    shutil.copymode(target, temporary)
    for entry in target.iterdir():
        if _REPLACED.fullmatch(entry.name) or (temporary / entry.name).exists():
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
