"""Argument checks of the product verbs, and conversion of operands to the form that ops take."""

from __future__ import annotations

import torch

from torchao_mx.errors import (
    HIGH_PRECISION_DTYPES,
    check_axis,
    check_blocks,
    check_format,
    check_high_precision,
    check_offs,
    check_on_device_of,
    check_tensors,
)
from torchao_mx.formats import BlockFormat, QuantizeSpec, ScaleCalculationMode, check_scaling_mode


def product_sizes(qdata: torch.Tensor, fmt: BlockFormat, transpose_weight: bool) -> tuple[int, int]:
    """Return the reduced size of a product with ``W`` and its number of columns."""
    n, k = qdata.shape[-2], qdata.shape[-1] * fmt.elems_per_byte
    return (k, n) if transpose_weight else (n, k)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x [..., C]`` as ``[R, C]``."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def operands(
    x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cast x and the bias to the dtype that the product is computed in (autocast's, or x's own)."""
    check_tensors(x=x, optional={"bias": bias})
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast
        x = x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x
    check_high_precision(x.dtype, "x")
    return x, None if bias is None else bias.to(x.dtype)


def check_product(
    x: torch.Tensor, weight: torch.Tensor, columns: int, activation: QuantizeSpec | None
) -> None:
    """Refuse an x that does not fit the weight, or that ``activation`` cannot quantize."""
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; the weight reduces over {columns} elements, which x's last "
            f"axis must have"
        )
    if x.device != weight.device:
        raise ValueError(
            f"x is on {x.device} and the weight on {weight.device}; move one with .to(device)"
        )
    if activation is not None and columns % activation.format.block_size:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis ({columns}) is not a multiple of "
            f"{activation.format.block_size}, the block size of {activation.format.name}"
        )


def check_weight(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    fmt: BlockFormat,
) -> None:
    """Refuse tensors that do not form a weight of ``fmt``."""
    check_packed(qdata, scale, per_tensor_scale, fmt)
    if qdata.dim() not in (2, 3):
        raise ValueError(
            f"qdata has shape {tuple(qdata.shape)}; a weight is [N, K], or [E, N, K] for experts: flatten or "
            f"unsqueeze it"
        )


def dense_bias(bias: torch.Tensor | None, columns: int, x: torch.Tensor) -> torch.Tensor | None:
    """Return ``bias`` as ``[columns]``, expanding a single number."""
    if bias is None:
        return None
    check_tensors(bias=bias)
    check_on_device_of(x, bias, "bias")
    if bias.shape in ((), (1,)):
        return bias.expand(columns)
    if bias.shape != (columns,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; the product has {columns} columns and takes a bias "
            f"[{columns}]"
        )
    return bias


def check_groups(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ``offs`` and ``order`` as int32; refuse operands that do not form a grouped product."""
    check_tensors(offs=offs, optional={"order": order, "bias": bias})
    if x.dim() != 2 or weight.dim() != 3 or offs.shape != weight.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, the weight {tuple(weight.shape)} (packed) and offs "
            f"{tuple(offs.shape)}; a grouped product takes x [R, K], a weight [E, N, K] and offs [E]"
        )
    check_offs(offs, x)
    if bias is not None:
        check_on_device_of(x, bias, "bias")
        if bias.shape != (weight.shape[0], columns):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; a grouped product with {weight.shape[0]} experts of "
                f"{columns} columns takes a bias [{weight.shape[0]}, {columns}]"
            )
    return offs, None if order is None else check_order(order, x.shape[0], x)


def check_order(order: torch.Tensor, n_tokens: int, x: torch.Tensor) -> torch.Tensor:
    """Return ``order`` as int32; refuse one that cannot be a permutation of k rows per token."""
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order has dtype {order.dtype}; row numbers are int32: use order.int()")
    check_on_device_of(x, order, "order")
    rows = order.shape[0] if order.dim() == 1 else -1
    if (rows != 0) if n_tokens == 0 else (rows < n_tokens or rows % n_tokens):
        raise ValueError(
            f"order has shape {tuple(order.shape)} for {n_tokens} token(s); it must be [T * k], the "
            f"argsort of the flattened [T, k] expert ids"
        )
    return order.int()


def adapters_of(
    x: torch.Tensor,
    qdata: torch.Tensor,
    fmt: BlockFormat,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    transpose_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the op's ``(down, up)``; refuse adapters that do not fit the weight."""
    check_tensors(lora_a=lora_a, lora_b=lora_b)
    *lead, n, packed = qdata.shape
    k = packed * fmt.elems_per_byte
    for name, adapter in (("lora_a", lora_a), ("lora_b", lora_b)):
        if adapter.dtype not in HIGH_PRECISION_DTYPES:
            raise TypeError(
                f"{name} has dtype {adapter.dtype}; adapters are bfloat16, float16 or float32: convert "
                f"it with .to(torch.bfloat16)"
            )
        check_on_device_of(x, adapter, name)
    rank = lora_a.shape[-2] if lora_a.dim() > 1 else 0
    if lora_a.shape != (*lead, rank, k) or lora_b.shape != (*lead, n, rank):
        experts = "".join(f"{size}, " for size in lead)
        raise ValueError(
            f"lora_a has shape {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)}; a weight "
            f"[{experts}{n}, {k}] takes lora_a [{experts}r, {k}] and lora_b [{experts}{n}, r]"
        )
    if not 1 <= rank <= min(n, k):
        raise ValueError(
            f"the adapters have rank {rank}; a weight of {n} x {k} takes a rank from 1 to {min(n, k)}"
        )
    if not isinstance(scaling, (int, float)):
        raise TypeError(
            f"scaling is a {type(scaling).__name__}; it must be a Python number: use .item() once, outside the "
            f"training loop, or multiply lora_b by it"
        )
    return (lora_a, lora_b) if transpose_weight else (lora_b.mT, lora_a.mT)


def check_operand(
    x: torch.Tensor,
    fmt: BlockFormat,
    scaling_mode: ScaleCalculationMode,
    axis: int,
    per_tensor_scale: torch.Tensor | None,
) -> None:
    """Refuse arguments that :func:`quantize` and ``fake_quantize`` cannot take, before any kernel runs."""
    check_tensors(x=x, optional={"per_tensor_scale": per_tensor_scale})
    check_format(fmt)
    check_scaling_mode(scaling_mode)
    check_axis(axis)
    check_high_precision(x.dtype, "x")
    check_blocks(x.shape, fmt, axis, "x")
    if per_tensor_scale is not None:
        check_per_tensor_scale(per_tensor_scale, fmt, x)


def check_per_tensor_scale(
    per_tensor_scale: torch.Tensor, fmt: BlockFormat, x: torch.Tensor
) -> None:
    """Refuse a per-tensor scale if ``fmt`` has none or its shape does not fit ``x``."""
    if not fmt.has_per_tensor_scale:
        raise ValueError(f"{fmt.name} has no per-tensor scale; leave per_tensor_scale out")
    if per_tensor_scale.dtype != torch.float32:
        raise TypeError(
            f"per_tensor_scale has dtype {per_tensor_scale.dtype}; it must be float32: use .float()"
        )
    check_on_device_of(x, per_tensor_scale, "per_tensor_scale")
    shape = tuple(per_tensor_scale.shape)
    if shape and (x.dim() != 3 or shape != (x.shape[0], 1, 1)):
        raise ValueError(
            f"per_tensor_scale has shape {shape}; it must be 0-d, or [E, 1, 1] for x [E, M, K]: "
            f"x has shape {tuple(x.shape)}"
        )


def check_packed(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    fmt: BlockFormat,
) -> None:
    """Refuse tensors that :func:`quantize` does not return for ``fmt``: kernels would read out of bounds."""
    check_tensors(qdata=qdata, scale=scale, optional={"per_tensor_scale": per_tensor_scale})
    check_format(fmt)
    if qdata.dtype != fmt.qdata_dtype or scale.dtype != fmt.scale_dtype:
        raise TypeError(
            f"{fmt.name} needs qdata of dtype {fmt.qdata_dtype} and scale of dtype {fmt.scale_dtype}; "
            f"got {qdata.dtype} and {scale.dtype}: reinterpret bytes with .view(dtype)"
        )
    per_scale = fmt.block_size // fmt.elems_per_byte
    if qdata.dim() == 0 or qdata.shape != (*scale.shape[:-1], scale.shape[-1] * per_scale):
        raise ValueError(
            f"qdata has shape {tuple(qdata.shape)} and scale {tuple(scale.shape)}; in {fmt.name} a scale "
            f"covers {per_scale} bytes of the last axis and the other axes are equal: pass the two results of "
            f"one quantize"
        )
    if scale.device != qdata.device:
        raise ValueError(
            f"scale is on {scale.device} and qdata on {qdata.device}; move one with .to(device)"
        )
    if per_tensor_scale is not None:
        check_per_tensor_scale(per_tensor_scale, fmt, qdata)


NO_ACTIVATION = ("", "")


def spec_strings(spec: QuantizeSpec | None) -> tuple[str, str]:
    """Return a spec in its op-schema form: format name and scaling mode, both empty for None."""
    return NO_ACTIVATION if spec is None else (spec.format.name, spec.scaling_mode.value)
