"""Argument checks that several layers share. Each error says what came, what is needed and what to do."""

from __future__ import annotations

from typing import Any

import torch

from torchao_mx.formats import BlockFormat

HIGH_PRECISION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cpu", "cuda", "meta")


def check_tensors(*, optional: dict[str, Any] | None = None, **tensors: Any) -> None:
    """Raise unless every operand of an op is a dense tensor on a device that has kernels.

    Args:
        optional: operands by name; each may be None.
        tensors: operands by name.

    Raises:
        TypeError: an operand is not a tensor.
        NotImplementedError: an operand is sparse or nested, or lies on another kind of device.
    """
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(
                f"{name} is a {type(t).__name__}; it must be a torch.Tensor: use torch.as_tensor({name})"
            )
        if t.is_nested or t.layout != torch.strided:
            kind = "nested" if t.is_nested else f"{t.layout}".removeprefix("torch.")
            way = "torch.nested.to_padded_tensor" if t.is_nested else ".to_dense()"
            raise NotImplementedError(
                f"{name} is a tensor of layout {kind}; it must be dense: use {way}"
            )
        if t.device.type not in _DEVICES:
            raise NotImplementedError(
                f"{name} is on {t.device}; the kernels run on CPU and CUDA: move it with .to(device)"
            )
    if optional:
        check_tensors(**{name: t for name, t in optional.items() if t is not None})


def check_format(fmt: Any) -> None:
    """Raise TypeError unless ``fmt`` is a block format."""
    if not isinstance(fmt, BlockFormat):
        raise TypeError(f"fmt={fmt!r} is not a BlockFormat; use one from torchao_mx, such as MXFP4")


def check_on_device_of(x: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """Raise ValueError unless ``other`` is on x's device; the message calls it ``name``."""
    if other.device != x.device:
        raise ValueError(
            f"{name} is on {other.device} and x on {x.device}; move one with .to(device)"
        )


def check_offs(offs: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless ``offs`` has the dtype, device and shape of group end offsets; values are not read."""
    if offs.dtype != torch.int32:
        raise TypeError(f"offs has dtype {offs.dtype}; end offsets are int32: use offs.int()")
    check_on_device_of(x, offs, "offs")
    if offs.dim() != 1 or offs.shape[0] == 0:
        raise ValueError(
            f"offs has shape {tuple(offs.shape)}; it must be [E], the end offsets of one group or more: use "
            f"the cumulative sum of the groups' row counts"
        )


def check_high_precision(dtype: torch.dtype, what: str) -> None:
    """Raise TypeError unless ``dtype`` is bfloat16, float16 or float32."""
    if dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(
            f"{what} has dtype {dtype}; block formats are quantized from and dequantized to "
            f"bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first"
        )


def check_axis(axis: int) -> None:
    """Raise ValueError unless blocks may run along ``axis``."""
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
            f"{what} has shape {tuple(shape)}; block formats need dimensions above zero: "
            f"skip empty tensors before quantizing"
        )
    if shape[axis] % fmt.block_size:
        raise ValueError(
            f"{what} has shape {tuple(shape)}; its axis {axis} ({shape[axis]}) is not a multiple of "
            f"{fmt.block_size}, the block size of {fmt.name}: pad it, or leave this layer out with "
            f"filter_fn"
        )
