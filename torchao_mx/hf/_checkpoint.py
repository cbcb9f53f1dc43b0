"""A checkpoint's safetensors files, checked whole before a model is built.

Headers tell names, shapes, dtypes and where each tensor ends, so a file cut short is found without reading
it. Of the data only the scales are read, a seventeenth of the packed bytes, and the blocks of a weight whose
scales are all zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from torchao_mx.hf._layout import (
    BLOCKS,
    SCALES,
    block_shapes,
    packed_modules,
    packed_weights,
    tied_names,
)
from torchao_mx.hf._staging import named_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAN_SCALE = 255
_LINES = 12  # of an error's list
_FLOATS = ("BF16", "F16", "F32")
_LENGTH_BYTES = 8  # of the header's length, at the start of a file


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, by its header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint in ``folder``, of one file or of the shards that the index lists.

    Raises:
        ValueError: no weights; a shard missing, cut short or unreadable; an index that disagrees with files.
    """
    # A save that was killed midway has config.json name the weights, by transformers' own key.
    named = named_weights(folder)
    if named is not None and not named.endswith(".json"):
        return _read_header(folder / named)
    index = folder / (named or INDEX)
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(
                f"{folder}: neither {SINGLE} nor {INDEX} is there; give a folder with the weights as "
                f"safetensors (other formats are not read)"
            )
        return _read_header(folder / SINGLE)
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index}: not an index of shards ({error!r}); download it again"
        ) from error
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _read_header(folder / file).items():
            if places.get(name) != file:
                raise ValueError(
                    f"{name}: in {file}, while {index.name} places it in {places.get(name)}; the files are "
                    f"of different checkpoints: download all of them again"
                )
            entries[name] = entry
    lost = sorted(places.keys() - entries.keys())
    if lost:
        raise ValueError(
            f"{lost[0]}: {index.name} places it in {places[lost[0]]}, where it is not ({len(lost)} such "
            f"tensors); download that file again"
        )
    return entries


def _read_header(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise ValueError(f"{file}: the index lists this file and it is missing; download it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if not 0 < length <= size - _LENGTH_BYTES:
            raise ValueError(
                f"{file}: {size} bytes, cut short within its header or no safetensors file; download it again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: Entry(file, record["dtype"], tuple(record["shape"]))
                for name, record in header.items()
            }
            ends = {name: start + record["data_offsets"][1] for name, record in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: its header cannot be read ({error!r}); download it again"
            ) from error
    name, end = max(ends.items(), key=lambda item: item[1], default=("", start))
    if end > size:
        raise ValueError(
            f"{name}: ends at byte {end} of {file}, which has {size}: the file is cut short, download it "
            f"again"
        )
    return entries


def check_checkpoint(entries: dict[str, Entry], skeleton: nn.Module, folder: Path) -> None:
    """Refuse a checkpoint from which ``skeleton``, a gpt-oss model on ``meta``, could not be loaded whole.

    Raises:
        NotImplementedError: the model has no experts of a class known here.
        ValueError: one line for each tensor that is missing, unknown, misshapen, of another dtype or without
            its partner; then for each scale that is NaN and each weight that is zeros throughout.
    """
    weights = packed_weights(skeleton)
    if not weights:
        raise NotImplementedError(
            f"{type(skeleton).__name__} has no experts that are read from MXFP4 checkpoints; those of "
            f"gpt-oss are. For another architecture load a bf16 checkpoint with config=MXWeightOnlyConfig()"
        )
    problems = header_problems(entries, skeleton, weights)
    if not problems:
        for weight in tqdm(weights, desc="Checking scales", disable=None):
            problems += _data_problems(entries, weight)
    if problems:
        raise_problems(problems, f"{folder} cannot be loaded")


def raise_problems(problems: list[str], what: str) -> None:
    """One error of them all."""
    more = [f"... and {len(problems) - _LINES} more"] if len(problems) > _LINES else []
    raise ValueError("\n".join([f"{what}:", *problems[:_LINES], *more]))


def header_problems(
    entries: dict[str, Entry], skeleton: nn.Module, weights: list[str]
) -> list[str]:
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    tied = tied_names(skeleton)
    for name, tensor in skeleton.state_dict().items():
        if name in weights:
            for suffix, shape in block_shapes(tensor.shape, name).items():
                wanted[name + suffix] = (("U8",), shape)
        elif name not in tied:
            wanted[name] = (_FLOATS, tuple(tensor.shape))
    problems = []
    for name, (dtypes, shape) in wanted.items():
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name}: missing{_partner(name, entries)}")
        elif entry.shape != shape:
            problems.append(
                f"{name}: has shape {entry.shape} and config.json asks for {shape}; use the config.json of "
                f"this checkpoint, or export the tensor again"
            )
        elif entry.dtype not in dtypes:
            problems.append(
                f"{name}: has dtype {entry.dtype} and needs {' or '.join(dtypes)}; export it again"
            )
    experts = tuple(f"{name}." for name, _ in packed_modules(skeleton))
    for name in entries.keys() - wanted.keys():
        if name.startswith(experts) or name.endswith((BLOCKS, SCALES)):
            problems.append(
                f"{name}: the model of config.json has no place for it; use the config.json of this "
                f"checkpoint, or remove the tensor"
            )
    return problems


def _partner(name: str, entries: dict[str, Entry]) -> str:
    """What a message says of a missing tensor's kin."""
    for suffix, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        if name.endswith(suffix):
            stem = name.removesuffix(suffix)
            if stem in entries:
                return f", and {stem} is there unpacked; export it as blocks and scales"
            if stem + other in entries:
                return f", and {stem + other} is there: download both again, they belong together"
    return "; download or export the checkpoint again"


def _data_problems(entries: dict[str, Entry], weight: str) -> list[str]:
    def read(suffix: str) -> torch.Tensor:
        with safe_open(entries[weight + suffix].file, framework="pt") as file:
            return file.get_tensor(weight + suffix)

    return value_problems(weight, lambda: read(BLOCKS), read(SCALES))


def value_problems(
    weight: str, blocks: Callable[[], torch.Tensor], scales: torch.Tensor
) -> list[str]:
    """A line for a weight that is zeros throughout, or some of whose scales are NaN; ``blocks`` if needed."""
    largest = int(scales.max())
    if largest == 0 and not blocks().any():
        problem = (
            f"{weight}{BLOCKS}: it and {weight.rpartition('.')[2]}{SCALES} are zero throughout, "
            f"placeholders that nothing was written to; download or export the checkpoint again"
        )
    elif largest == NAN_SCALE:
        places = (scales == NAN_SCALE).nonzero()
        problem = (
            f"{weight}{SCALES}: {len(places)} of {scales.numel()} scales are NaN (byte {NAN_SCALE}), the "
            f"first at {tuple(places[0].tolist())}; the weights were quantized from NaN or Inf, or the file "
            f"is damaged: export it again"
        )
    else:
        return []
    return [problem]


def quant_method(config: Any) -> str | None:
    """What a model's config says of its quantization; None where it says nothing.

    Raises:
        ValueError: it says something that names no method.
    """
    record = getattr(config, "quantization_config", None)
    if record is None:
        return None
    method = record.get("quant_method") if isinstance(record, dict) else None
    if not isinstance(method, str):
        raise ValueError(
            f"quantization_config in config.json is {record!r} and names no quant_method; "
            f"for gpt-oss's layout it is {{'quant_method': 'mxfp4'}}"
        )
    return method
