"""A gpt-oss checkpoint in high precision to the published layout, file to file: no model is built."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from torchao_mx.formats import MXFP4, ScaleCalculationMode
from torchao_mx.hf.checkpoint import header_problems, raise_problems, read_folder, value_problems
from torchao_mx.hf.config import build_skeleton, checked_method, load_config
from torchao_mx.hf.files import Entry, read_json, read_tensor
from torchao_mx.hf.inspection import Row, relative_error
from torchao_mx.hf.layouts.gpt_oss import BLOCKS, SCALES, block_shapes, packed_weights, tied_names
from torchao_mx.hf.quantizer import MXQuantizationConfig
from torchao_mx.hf.save import copy_others, replacing, write_tensors
from torchao_mx.hf.staging import CONFIG, WEIGHTS_KEY, writing
from torchao_mx.hf.state import stored
from torchao_mx.tensor import MXTensor

_ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}


def quantize_checkpoint(
    source: Path, target: Path, scaling_mode: ScaleCalculationMode, limit: int
) -> tuple[list[Row], Row]:
    """Quantize the experts of the checkpoint ``source`` to MXFP4 into ``target``; (rows, totals).

    Tensors are read and quantized one by one, and written by shards. All others stay as they are, as do files
    such as a tokenizer's; those that the model has no place for are left out.

    Args:
        source: experts as ``gate_up_proj [E, in, out]`` and ``down_proj``, in one file or in shards.
        target: the folder to write, new or existing; on any error it is as it was.
        scaling_mode: how a block's scale follows from its largest magnitude.
        limit: bytes a shard may have.

    Raises:
        ValueError: ``source`` cannot be read, is packed already, is of another architecture, or has tensors
            that are missing, misshapen, of another dtype or not finite; the message names each.
    """
    entries, names, weights = _checked(source)
    sizes: dict[str, int] = {}
    for name in names:
        if name in weights:
            shapes = block_shapes(torch.Size(entries[name].shape), name)
            sizes |= {name + suffix: math.prod(shape) for suffix, shape in shapes.items()}
        else:
            sizes[name] = math.prod(entries[name].shape) * _ITEMSIZE[entries[name].dtype]
    rows: list[Row] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            tensor = read_tensor(entries, name)
            if name not in weights:
                yield name, tensor
                continue
            weight = _packed(name, tensor, scaling_mode)
            rows.append(_row(name, weight, tensor))
            yield from stored(name, weight.mT).items()

    with replacing(target, sum(sizes.values())) as folder:
        _write_config(source, folder)
        copy_others(source, folder)
        write_tensors(sizes, tensors(), folder, limit, "Quantizing")
    total = {
        "quantized_weights": len(rows),
        "bytes_before": sum(row["bytes_before"] for row in rows),
        "bytes_after": sum(row["bytes_after"] for row in rows),
        "other_tensors": len(names) - len(rows),
    }
    return rows, total


def _checked(source: Path) -> tuple[dict[str, Entry], list[str], list[str]]:
    """A checkpoint's tensors by name, the names to write in the model's order, and those to quantize."""
    entries = read_folder(source)
    config, _ = load_config(source, entries.values())
    method = checked_method(config, entries, source)
    if method is not None:
        packed = (name for name in sorted(entries) if name.endswith((BLOCKS, SCALES)))
        what = next(packed, f"quant_method={method!r} in {CONFIG}")
        raise ValueError(
            f"{source}: quantized already, {what}; give the checkpoint in high precision that it is from"
        )
    skeleton = build_skeleton(AutoModelForCausalLM, config, source)
    weights = packed_weights(skeleton)
    if not weights:
        raise ValueError(
            f"{source}: {type(skeleton).__name__} has no experts that MXFP4 checkpoints hold, as "
            f"gpt-oss has; use from_pretrained with config=MXWeightOnlyConfig() for other models"
        )
    problems = header_problems(entries, skeleton, [])
    if problems:
        raise_problems(problems, f"{source} cannot be quantized")
    tied = tied_names(skeleton)
    return entries, [name for name in skeleton.state_dict() if name not in tied], weights


def _packed(name: str, original: torch.Tensor, scaling_mode: ScaleCalculationMode) -> MXTensor:
    """``[E, in, out]`` as ``[E, out, in]`` in blocks along ``in``, an expert at a time."""
    finite = original.isfinite()
    if not finite.all():
        raise ValueError(
            f"{name}: {finite.logical_not().sum()} of {finite.numel()} values are not finite; export it again"
        )
    experts = [MXTensor.from_hp(expert.mT.contiguous(), MXFP4, scaling_mode) for expert in original]
    weight = torch.stack(experts)
    blocks, scales = weight.to_blocks()
    problems = value_problems(name, lambda: blocks, scales)
    if problems:
        raise_problems(problems, "what was quantized could not be loaded")
    return weight


def _row(name: str, weight: MXTensor, original: torch.Tensor) -> Row:
    return {
        "name": name,
        "shape": list(weight.shape),
        "bytes_before": original.nbytes,
        "bytes_after": weight.qdata.nbytes + weight.scale.nbytes,
        "error": relative_error(weight, original),
    }


def _write_config(source: Path, folder: Path) -> None:
    record = read_json(source / CONFIG)
    record["quantization_config"] = MXQuantizationConfig().to_dict()
    record.pop(WEIGHTS_KEY, None)  # files of the source
    with writing(folder / CONFIG):
        (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
