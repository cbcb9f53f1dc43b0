"""torchao-mx: checkpoints from the command line.

    torchao-mx inspect FOLDER [--compare FOLDER] [--json]

``inspect`` lists the packed weights of a checkpoint in gpt-oss's layout (``NAME_blocks``, ``NAME_scales``):
shape, bytes, the range of their scales as powers of two, and how many rows are e4m3 numbers times one power
of two, so that 8-bit tensor cores take them without loss. ``--compare`` adds the error of the packed values
against the high-precision weights ``NAME`` of another checkpoint.

Exit codes: 0; 1 where a checkpoint is damaged or does not fit the other; 2 for arguments that make no sense.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from torchao_mx import MXTensor
from torchao_mx.hf._checkpoint import NAN_SCALE, Entry, read_folder
from torchao_mx.hf._layout import BLOCKS, SCALES
from torchao_mx.reference.fp8 import fits_fp8

Row = dict[str, Any]
_EXPONENT_BIAS = 127
_COLUMNS = {
    "name": "weight", "format": "format", "shape": "shape", "bytes": "bytes", "scales": "scales",
    "lossless_rows": "rows lossless in e4m3", "error": "relative error",
}  # fmt: skip


def inspect(folder: Path, compare: Path | None = None) -> tuple[list[Row], Row]:
    """(a row for each packed weight, totals).

    Args:
        folder: a checkpoint with weights in blocks and scales.
        compare: one with the same weights in high precision, ``[E, in, out]`` as transformers has gpt-oss's.

    Raises:
        ValueError: a checkpoint that cannot be read, has no packed weight, or lacks half of one; tensors of
            ``compare`` that are missing or of another shape.
    """
    entries = read_folder(folder)
    names = sorted(n.removesuffix(BLOCKS) for n in entries if n.endswith(BLOCKS))
    halves = {n.removesuffix(SCALES) for n in entries if n.endswith(SCALES)} ^ set(names)
    if halves:
        raise ValueError(f"{min(halves)}: {folder} has its blocks or its scales, and not the other")
    if not names:
        raise ValueError(
            f"{folder}: no weights in blocks and scales; there is nothing packed to inspect"
        )
    others = None if compare is None else read_folder(compare)
    rows = []
    for name in tqdm(names, desc="Inspecting", disable=None, file=sys.stderr):
        blocks, scales = (_tensor(entries, name + suffix) for suffix in (BLOCKS, SCALES))
        try:
            weight = MXTensor.from_blocks(blocks, scales, torch.bfloat16)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
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


def _tensor(entries: dict[str, Entry], name: str) -> torch.Tensor:
    with safe_open(entries[name].file, "pt") as file:
        return file.get_tensor(name)


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
    """``|packed - original| / |original|``, an expert at a time."""
    if name not in others:
        raise ValueError(f"{name}: {folder} has no such tensor to compare with")
    original = _tensor(others, name)
    if original.shape != weight.mT.shape:
        raise ValueError(
            f"{name}: has shape {tuple(original.shape)} in {folder}; the packed weight is "
            f"{tuple(weight.mT.shape)} as transformers has it, [E, in, out]"
        )
    difference = norm = 0.0
    for packed, wanted in zip(weight, original, strict=True):
        wanted = wanted.double().mT
        difference += (packed.dequantize(torch.float32).double() - wanted).square().sum().item()
        norm += wanted.square().sum().item()
    return (difference / norm) ** 0.5 if norm else float(difference > 0)


def _table(rows: list[Row], total: Row) -> str:
    cells = [list(_COLUMNS.values())]
    for row in rows:
        scales = f"2^{row['min_exponent']} .. 2^{row['max_exponent']}"
        shown = row | {
            "shape": " x ".join(map(str, row["shape"])),
            "bytes": f"{row['bytes']:,}",
            "scales": scales + (f", {row['nan_scales']:,} NaN" if row["nan_scales"] else ""),
            "lossless_rows": f"{row['lossless_rows']:,} of {row['rows']:,}",
            "error": f"{row['error']:.4f}" if "error" in row else None,
        }
        cells.append([shown[key] for key in _COLUMNS])
    wanted = [i for i, key in enumerate(_COLUMNS) if any(line[i] is not None for line in cells[1:])]
    widths = [max(len(line[i]) for line in cells) for i in wanted]
    lines = [
        "  ".join(line[i].ljust(width) for i, width in zip(wanted, widths, strict=True)).rstrip()
        for line in cells
    ]
    bits = 8 * total["packed_bytes"] / total["elements"]
    lines.append(
        f"{total['packed_weights']} packed weights, {total['packed_bytes']:,} bytes, {bits:.2f} bits an "
        f"element; {total['other_tensors']} other tensors"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="torchao-mx", description="Checkpoints in microscaling formats."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="what a packed checkpoint holds")
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="the same weights in high precision"
    )
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    try:
        rows, total = inspect(options.folder, options.compare)
    except (ValueError, OSError) as error:
        print(f"torchao-mx: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"weights": rows, "total": total}) if options.json else _table(rows, total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
