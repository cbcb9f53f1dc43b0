"""matmul and grouped_mm with a packed weight: decode, then the vendor's GEMM.

MXFP4 times MXFP4 takes 8-bit tensor cores where the GPU has them (``ops/mxfp4_product.py``).

For a weight ``W [N, K]`` packed along K, and x quantized on the way in where an ``activation`` says so::

    transpose_weight       Y = Q(X) Wq^T   (X [M, K])     dX = dY Wq      a forward pass
    not transpose_weight   Y = X Wq        (X [M, N])     dX = dY Wq^T    a backward pass

The weight is frozen: backward refers to the packed bytes and decodes them again, so no decoded copy lives
between the passes. Gradients go to X (straight through its quantization) and to the bias.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from torchao_mx.checks import check_high_precision
from torchao_mx.formats import BlockFormat, QuantizeSpec, format_by_name
from torchao_mx.ops._library import define_op
from torchao_mx.ops.dequantize import dequantize_op
from torchao_mx.ops.fake_quantize import fake_quantize_op
from torchao_mx.ops.mxfp4_product import mxfp4_product_op, takes_mxfp4_product
from torchao_mx.ops.quantize import per_tensor_scale as amax_scale
from torchao_mx.ops.quantize import quantize_op

NO_ACTIVATION = ("", "")


def spec_strings(spec: QuantizeSpec | None) -> tuple[str, str]:
    """A spec as an op schema carries it: format name and scaling mode, both empty for None."""
    return NO_ACTIVATION if spec is None else (spec.format.name, spec.scaling_mode.value)


def fake_quantize_activation(x: torch.Tensor, fmt: str, scaling_mode: str) -> torch.Tensor:
    """``x`` as its quantized values; unchanged where ``fmt`` is empty or there are no rows."""
    if not fmt or x.numel() == 0:
        return x
    f = format_by_name(fmt)
    pts = amax_scale(x, f) if f.has_per_tensor_scale else None
    return fake_quantize_op(x, fmt, scaling_mode, -1, pts)


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x w^T + bias`` for 2-D ``x [M, K]`` and ``w [N, K]``, or 3-D with a batch in front.

    QAT and the converted model both come here with equal operands, hence with equal results.
    """
    if w.dim() == 2:
        return F.linear(x, w, bias)
    out = torch.bmm(x, w.mT)
    return out if bias is None else out + bias


def _matmul(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    fmt: str,
    transpose_weight: bool,
    activation: str,
    activation_mode: str,
) -> torch.Tensor:
    if transpose_weight and takes_mxfp4_product(x, qdata.shape[0], fmt, activation):
        return mxfp4_product_op(
            *quantize_op(x, activation, activation_mode, -1, None), qdata, scale, bias
        )
    x = fake_quantize_activation(x, activation, activation_mode)
    w = dequantize_op(qdata, scale, fmt, x.dtype, -1, per_tensor_scale)
    return product(x, w if transpose_weight else w.mT, bias)


def _matmul_fake(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    fmt: str,
    transpose_weight: bool,
    activation: str,
    activation_mode: str,
) -> torch.Tensor:
    n, packed = qdata.shape[-2:]
    columns = n if transpose_weight else packed * format_by_name(fmt).elems_per_byte
    return x.new_empty((*x.shape[:-1], columns))


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _x, qdata, scale, per_tensor_scale, bias, fmt, transpose_weight, *_ = inputs
    ctx.save_for_backward(qdata, scale, per_tensor_scale)
    ctx.fmt, ctx.transpose_weight = fmt, transpose_weight
    ctx.bias_shape = None if bias is None else bias.shape


def _matmul_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    qdata, scale, per_tensor_scale = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = matmul_op(
            dy, qdata, scale, per_tensor_scale, None, ctx.fmt, not ctx.transpose_weight,
            *NO_ACTIVATION,
        )  # fmt: skip
    if ctx.bias_shape is not None and ctx.needs_input_grad[4]:
        dbias = dy.sum_to_size(ctx.bias_shape)
    # x, qdata, scale, per_tensor_scale, bias, fmt, transpose_weight, activation, activation_mode
    return dx, None, None, None, dbias, None, None, None, None


matmul_op = define_op(
    "matmul",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? per_tensor_scale, Tensor? bias, str fmt,"
    " bool transpose_weight, str activation, str activation_mode) -> Tensor",
    cpu=_matmul,
    cuda=_matmul,
    fake=_matmul_fake,
    setup_context=_save_packed,
    backward=_matmul_backward,
)


def _grouped_mm(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    per_tensor_scale: torch.Tensor | None,
    offs: torch.Tensor,
    fmt: str,
    transpose_weight: bool,
    activation: str,
    activation_mode: str,
) -> torch.Tensor:
    x = fake_quantize_activation(x, activation, activation_mode)
    w = dequantize_op(qdata, scale, fmt, x.dtype, -1, per_tensor_scale)
    w = w.mT if transpose_weight else w
    if x.shape[0] == 0:
        return x.new_empty((0, w.shape[-1]))
    out = torch._grouped_mm(_aligned_rows(x), w, offs=offs)
    # The rows behind the last group belong to no expert; torch leaves them as it found them.
    behind = torch.arange(x.shape[0], device=x.device) >= offs[-1]
    return out.masked_fill_(behind[:, None], 0)


def _aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x [R, C]`` as ``torch._grouped_mm`` wants it: contiguous rows at a stride of 16-byte multiples."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * x.itemsize % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _x, qdata, scale, per_tensor_scale, offs, fmt, transpose_weight, *_ = inputs
    ctx.save_for_backward(qdata, scale, per_tensor_scale, offs)
    ctx.fmt, ctx.transpose_weight = fmt, transpose_weight


def _grouped_mm_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    qdata, scale, per_tensor_scale, offs = ctx.saved_tensors
    dx = grouped_mm_op(
        dy, qdata, scale, per_tensor_scale, offs, ctx.fmt, not ctx.transpose_weight,
        *NO_ACTIVATION,
    )  # fmt: skip
    # x, qdata, scale, per_tensor_scale, offs, fmt, transpose_weight, activation, activation_mode
    return dx, None, None, None, None, None, None, None, None


grouped_mm_op = define_op(
    "grouped_mm",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? per_tensor_scale, Tensor offs, str fmt,"
    " bool transpose_weight, str activation, str activation_mode) -> Tensor",
    cpu=_grouped_mm,
    cuda=_grouped_mm,
    fake=_matmul_fake,
    setup_context=_grouped_mm_setup,
    backward=_grouped_mm_backward,
)


def matmul(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    *,
    per_tensor_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    transpose_weight: bool = True,
    activation: QuantizeSpec | None = None,
) -> torch.Tensor:
    """``x @ W^T + bias`` (or ``x @ W``) with the packed ``W [N, K]`` or ``[B, N, K]``; see the file's head.

    Computes in x's dtype (autocast's, under autocast), whatever the weight was quantized from.

    Args:
        x: ``[..., K]`` (``[..., N]`` without ``transpose_weight``) for a 2-D weight, rank 1 and up;
            ``[B, M, K]`` for a 3-D one. bfloat16, float16 or float32.
        qdata: ``W``'s elements, as :func:`torchao_mx.ops.quantize` packs them along K.
        scale: ``W``'s block scales.
        fmt: the weight's format.
        per_tensor_scale: ``W``'s, where the format has one.
        bias: added to the product's rows.
        transpose_weight: reduce over K, the packed axis; otherwise over N.
        activation: how to quantize x first, in blocks along the reduced axis.

    Raises:
        TypeError: x's dtype.
        ValueError: shapes that do not multiply; a device other than the weight's; an ``activation`` whose
            blocks do not divide x's last axis.
    """
    columns = qdata.shape[-1] * fmt.elems_per_byte if transpose_weight else qdata.shape[-2]
    x, bias = operands(x, bias)
    check_product(x, qdata, columns, activation)
    args = (qdata, scale, per_tensor_scale, bias, fmt.name, transpose_weight)
    if qdata.dim() == 3:
        if x.dim() != 3 or x.shape[0] != qdata.shape[0]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; a weight of {qdata.shape[0]} matrices multiplies "
                f"x [{qdata.shape[0]}, M, {columns}]: expand or reshape x"
            )
        return matmul_op(x, *args, *spec_strings(activation))
    out = matmul_op(x.reshape(-1, columns), *args, *spec_strings(activation))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def grouped_mm(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    offs: torch.Tensor,
    *,
    per_tensor_scale: torch.Tensor | None = None,
    transpose_weight: bool = True,
    activation: QuantizeSpec | None = None,
) -> torch.Tensor:
    """Rows ``offs[e - 1] : offs[e]`` of ``x`` times expert e of the packed ``W [E, N, K]``.

    ``offs [E]`` are int32 end offsets on x's device, as in ``torch._grouped_mm``, which does the product. The
    rest is as in :func:`matmul`; ``x [R, K]`` (``[R, N]`` without ``transpose_weight``) gives ``[R, N]``
    (``[R, K]``).
    """
    columns = qdata.shape[-1] * fmt.elems_per_byte if transpose_weight else qdata.shape[-2]
    x, _ = operands(x, None)
    check_product(x, qdata, columns, activation)
    if x.dim() != 2 or qdata.dim() != 3 or offs.shape != qdata.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, the weight {tuple(qdata.shape)} (packed) and offs "
            f"{tuple(offs.shape)}; a grouped product takes x [R, K], a weight [E, N, K] and offs [E]"
        )
    for size in (columns, qdata.shape[-2] if transpose_weight else x.shape[1]):
        if size * x.itemsize % 16:
            raise ValueError(
                f"the weight has an axis of {size}, in {x.dtype} not a multiple of 16 bytes, which "
                f"torch._grouped_mm wants of rows forward and backward: pad the weight"
            )
    if offs.dtype != torch.int32:
        raise TypeError(f"offs has dtype {offs.dtype}; end offsets are int32: use offs.int()")
    return grouped_mm_op(
        x, qdata, scale, per_tensor_scale, offs, fmt.name, transpose_weight,
        *spec_strings(activation),
    )  # fmt: skip


def operands(
    x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x in the dtype that the product is computed in (autocast's or its own), and the bias likewise."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # there is no autocast for meta
        x = x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x
    check_high_precision(x.dtype, "x")
    return x, None if bias is None else bias.to(x.dtype)


def check_product(
    x: torch.Tensor, weight: torch.Tensor, columns: int, activation: QuantizeSpec | None
) -> None:
    """Refuse an x that does not multiply the weight, or that ``activation`` cannot quantize."""
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
