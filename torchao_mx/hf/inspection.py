"""Inspect a packed checkpoint, one weight at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torchao_mx.hf.checkpoint import read_folder
from torchao_mx.hf.files import Entry, read_tensor
from torchao_mx.hf.layouts.gpt_oss import BLOCKS, NAN_SCALE, SCALES
from torchao_mx.reference.fp8 import fits_fp8
from torchao_mx.tensor import MXTensor

Row = dict[str, Any]
_EXPONENT_BIAS = 127


def inspect(folder: Path, compare: Path | None = None) -> tuple[list[Row], Row]:
    """Return a row for each packed weight, and totals.

    Args:
        folder: a checkpoint with weights in blocks and scales.
        compare: a checkpoint of the same weights in high precision, ``[E, in, out]`` as in gpt-oss.

    Raises:
        ValueError: a checkpoint cannot be read, has no packed weight, or lacks a weight's blocks or scales;
            tensors of ``compare`` are missing or misshapen.
    """
    entries = read_folder(folder)
    names = sorted(n.removesuffix(BLOCKS) for n in entries if n.endswith(BLOCKS))
    halves = {n.removesuffix(SCALES) for n in entries if n.endswith(SCALES)} ^ set(names)
    if halves:
        raise ValueError(
            f"{min(halves)}: {folder} has its blocks or its scales, but not both; "
            f"download or export both again"
        )
    if not names:
        raise ValueError(
            f"{folder}: nothing to inspect, since no weights are in blocks and scales; give a packed "
            f"checkpoint's folder"
        )
    others = None if compare is None else read_folder(compare)
    rows = []
    for name in tqdm(names, desc="Inspecting", disable=None, file=sys.stderr):
        blocks, scales = (read_tensor(entries, name + suffix) for suffix in (BLOCKS, SCALES))
        if not blocks.numel():
            raise ValueError(f"{name}: has no elements in {folder}; export it again")
        try:
            weight = MXTensor.from_blocks(blocks, scales, torch.bfloat16)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}; export it again") from None
        row = _row(name, weight)
        if others is not None:
            row["error"] = _error(name, weight, others, compare)
        rows.append(row)
    packed = {name + suffix for name in names for suffix in (BLOCKS, SCALES)}
    total = {
        "packed_weights": len(names),
        "packed_bytes": sum(row["bytes"] for row in rows),
        "other_tensors": len(entries) - len(packed),
        "elements": sum(row["elements"] for row in rows),
    }
    return rows, total


def _row(name: str, weight: MXTensor) -> Row:
    scale = weight.scale.view(torch.uint8)
    finite = scale[scale != NAN_SCALE]
    fits = fits_fp8(weight.qdata, weight.scale, True)
    return {
        "name": name,
        "format": weight.format.name,
        "shape": list(weight.shape),
        "elements": weight.numel(),
        "bytes": weight.qdata.nbytes + weight.scale.nbytes,
        "min_exponent": int(finite.min()) - _EXPONENT_BIAS if finite.numel() else None,
        "max_exponent": int(finite.max()) - _EXPONENT_BIAS if finite.numel() else None,
        "nan_scales": scale.numel() - finite.numel(),
        "rows": fits.numel(),
        "lossless_rows": int(fits.sum()),
    }


def _error(name: str, weight: MXTensor, others: dict[str, Entry], folder: Path) -> float:
    if name not in others:
        raise ValueError(
            f"{name}: {folder} has no such tensor to compare with; give "
            f"the high-precision checkpoint that this one was packed from"
        )
    original = read_tensor(others, name)
    if original.shape != weight.mT.shape:
        raise ValueError(
            f"{name}: has shape {tuple(original.shape)} in {folder}; the packed weight is "
            f"{tuple(weight.mT.shape)} in transformers' layout, [E, in, out]; give the high-precision "
            f"checkpoint that this one was packed from"
        )
    return relative_error(weight, original)


def relative_error(packed: MXTensor, original: torch.Tensor) -> float:
    """``|packed - original| / |original|`` of ``[E, out, in]`` and ``[E, in, out]``, one expert at a time."""
    difference = norm = 0.0
    for got, wanted in zip(packed, original, strict=True):
        wanted = wanted.double().mT
        difference += (got.dequantize(torch.float32).double() - wanted).square().sum().item()
        norm += wanted.square().sum().item()
    return (difference / norm) ** 0.5 if norm else float(difference > 0)
