"""The errors that several layers share. Each says what came, what is needed and what to do."""

from __future__ import annotations

import torch

from torchao_mx.formats import BlockFormat

HIGH_PRECISION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_high_precision(dtype: torch.dtype, what: str) -> None:
    """Raise TypeError unless ``dtype`` is one that the quantizers read."""
    if dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(
            f"{what} has dtype {dtype}; block formats are quantized from and dequantized to "
            f"bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first"
        )


def check_axis(axis: int) -> None:
    """Raise ValueError unless ``axis`` is one along which blocks may run."""
    if axis not in (-1, -2):
        raise ValueError(
            f"axis={axis}; blocks run along the last axis (-1) or the one before it (-2): "
            f"move yours there with torch.movedim"
        )


def check_blocks(
    shape: torch.Size | tuple[int, ...], fmt: BlockFormat, axis: int, what: str
) -> None:
    """Raise ValueError unless a tensor of ``shape`` divides into blocks of ``fmt`` along ``axis``."""
    if len(shape) < -axis:
        raise ValueError(
            f"{what} has shape {tuple(shape)}; axis={axis} needs at least {-axis} dimension(s): "
            f"unsqueeze it"
        )
    if 0 in shape:
        raise ValueError(
            f"{what} has shape {tuple(shape)}; a block format has no zero-size dimensions: "
            f"skip empty tensors before quantizing"
        )
    if shape[axis] % fmt.block_size:
        raise ValueError(
            f"{what} has shape {tuple(shape)}; its axis {axis} ({shape[axis]}) is not a multiple of "
            f"{fmt.block_size}, the block size of {fmt.name}: pad it, or leave this layer out with "
            f"filter_fn"
        )
