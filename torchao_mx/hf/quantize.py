"""Quantize a high-precision gpt-oss checkpoint to the published layout, file to file, without a model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from torchao_mx.formats import ScaleCalculationMode
from torchao_mx.hf.checkpoint import header_problems, read_folder
from torchao_mx.hf.config import build_skeleton, checked_method, load_config, tied_names
from torchao_mx.hf.files import CONFIG, read_json, read_tensor
from torchao_mx.hf.inspection import Row, relative_error
from torchao_mx.hf.layouts import gpt_oss
from torchao_mx.hf.problems import raise_problems
from torchao_mx.hf.write import Source, write
from torchao_mx.nn.experts.module import pack_singly
from torchao_mx.nn.ptq import MXWeightOnlyConfig


def quantize_checkpoint(
    source: Path, target: Path, scaling_mode: ScaleCalculationMode, limit: int
) -> tuple[list[Row], Row]:
    """Quantize the experts of the checkpoint ``source`` to MXFP4 into ``target``; return (rows, totals).

    Tensors are read and quantized one at a time, and written shard by shard. Other tensors are copied, as are
    files such as a tokenizer's; tensors that the model has no place for are left out.

    Args:
        source: has the experts as ``gate_up_proj [E, in, out]`` and ``down_proj``, in one file or in shards.
        target: the folder to write, new or existing; unchanged on any error.
        scaling_mode: how a block's scale follows from its largest magnitude.
        limit: maximum bytes per shard.

    Raises:
        ValueError: ``source`` cannot be read, is packed already, has another architecture, or has tensors
            that are missing, misshapen, of another dtype or not finite; the message names each.
    """
    rows: list[Row] = []
    made_of = folder_source(source, scaling_mode, rows)
    write(made_of, gpt_oss, target, limit, "Quantizing")
    total = {
        "quantized_weights": len(rows),
        "bytes_before": sum(row["bytes_before"] for row in rows),
        "bytes_after": sum(row["bytes_after"] for row in rows),
        "other_tensors": len(made_of.tensors) - len(rows),
    }
    return rows, total


def folder_source(source: Path, scaling_mode: ScaleCalculationMode, rows: list[Row]) -> Source:
    """A high-precision checkpoint as a source; reading a weight quantizes it and adds a row to ``rows``.

    Raises:
        ValueError: as :func:`quantize_checkpoint`.
    """
    entries = read_folder(source)
    config, _ = load_config(source, entries.values())
    method = checked_method(config, entries, source)
    if method is not None:
        packed = (
            name for name in sorted(entries) if name.endswith((gpt_oss.BLOCKS, gpt_oss.SCALES))
        )
        what = next(packed, f"quant_method={method!r} in {CONFIG}")
        raise ValueError(
            f"{source}: quantized already, {what}; give the high-precision checkpoint that it was made from"
        )
    skeleton = build_skeleton(AutoModelForCausalLM, config, source)
    raise_problems(header_problems(entries, skeleton, []), f"{source} cannot be quantized")
    weights, tied = gpt_oss.packed_weights(skeleton), tied_names(skeleton)
    tensors = {name: entries[name].empty() for name in skeleton.state_dict() if name not in tied}
    spec = MXWeightOnlyConfig(scaling_mode=scaling_mode).weight_spec

    def read(name: str) -> torch.Tensor:
        tensor = read_tensor(entries, name)
        if name not in weights:
            return tensor
        finite = tensor.isfinite()
        if not finite.all():
            raise ValueError(
                f"{name}: {finite.logical_not().sum()} of {finite.numel()} values are not finite; export it "
                f"again"
            )
        packed = pack_singly(tensor, True, spec)
        weight = packed.mT
        rows.append(
            {
                "name": name,
                "shape": list(weight.shape),
                "bytes_before": tensor.nbytes,
                "bytes_after": weight.qdata.nbytes + weight.scale.nbytes,
                "error": relative_error(weight, tensor),
            }
        )
        return packed

    record = read_json(source / CONFIG)
    return Source(f"{source}", skeleton, tensors, read, record, others=source)
