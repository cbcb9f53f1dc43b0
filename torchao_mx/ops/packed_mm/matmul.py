"""matmul and grouped_mm with a packed weight.

Products with an unquantized x are computed in ``packed_mm/op.py``. This file computes products with an
``activation``, which decode the weight and call the vendor's GEMM, and products of batches of matrices. MXFP4
times MXFP4 uses 8-bit tensor cores if the GPU has them (``packed_mm/exact_fp4.py``).

For a weight ``W [N, K]`` packed along K, and x quantized first if an ``activation`` is given::

    transpose_weight       Y = Q(X) Wq^T   (X [M, K])     dX = dY Wq      a forward pass
    not transpose_weight   Y = X Wq        (X [M, N])     dX = dY Wq^T    a backward pass

The weight is frozen: backward refers to the packed bytes and decodes them again, so no decoded copy lives
between the passes. Gradients go to X (straight through its quantization) and to the bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from torchao_mx import reference, torch_internals
from torchao_mx.formats import BlockFormat, QuantizeSpec, format_by_name
from torchao_mx.ops.core.arguments import (
    NO_ACTIVATION,
    as_rows,
    check_groups,
    check_product,
    check_weight,
    dense_bias,
    operands,
    product_sizes,
    spec_strings,
)
from torchao_mx.ops.core.operands import aligned_rows
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.moe.gather import tokens_of
from torchao_mx.ops.packed_mm.epilogue import zero_unassigned
from torchao_mx.ops.packed_mm.exact_fp4 import mxfp4_product_op, takes_mxfp4_product
from torchao_mx.ops.packed_mm.op import mm_op
from torchao_mx.ops.packed_mm.strategy import check_strategy
from torchao_mx.ops.quantization.dequantize import dequantize_op
from torchao_mx.ops.quantization.fake_quantize import fake_quantize_op
from torchao_mx.ops.quantization.quantize import per_tensor_scale as amax_scale
from torchao_mx.ops.quantization.quantize import quantize_op


def fake_quantize_activation(
    x: torch.Tensor, fmt: str, scaling_mode: str, offs: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x`` rounded to its quantized values; unchanged if ``fmt`` is empty or there are no rows.

    With ``offs``, end offsets of groups of x's rows, the per-tensor scale covers only the rows in groups.
    """
    if not fmt or x.numel() == 0:
        return x
    f = format_by_name(fmt)
    pts = amax_scale(x, f, offs=offs) if f.has_per_tensor_scale else None
    return fake_quantize_op(x, fmt, scaling_mode, -1, pts)


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x w^T + bias`` for 2-D ``x [M, K]`` and ``w [N, K]``, or 3-D with a leading batch axis.

    QAT and the converted model both call this with equal operands, so their results are equal.
    """
    if w.dim() == 2:
        return F.linear(x, w, bias)
    out = torch.bmm(x, w.mT)
    return out if bias is None else out + bias


class Arguments(NamedTuple):
    """The arguments of ``matmul`` in its schema's order; ``grouped_mm`` has ``offs`` in place of bias."""

    x: torch.Tensor
    qdata: torch.Tensor
    scale: torch.Tensor
    per_tensor_scale: torch.Tensor | None
    bias_or_offs: torch.Tensor | None
    fmt: str
    transpose_weight: bool
    activation: str
    activation_mode: str

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the decoded weight, ``[.., columns, reduced]``."""
        w = dequantize_op(self.qdata, self.scale, self.fmt, dtype, -1, self.per_tensor_scale)
        return w if self.transpose_weight else w.mT


def _matmul(*args: Any) -> torch.Tensor:
    a = Arguments(*args)
    if a.transpose_weight and takes_mxfp4_product(a.x, a.qdata.shape[0], a.fmt, a.activation):
        quantized = quantize_op(a.x, a.activation, a.activation_mode, -1, None)
        return mxfp4_product_op(*quantized, a.qdata, a.scale, a.bias_or_offs)
    x = fake_quantize_activation(a.x, a.activation, a.activation_mode)
    return product(x, a.values(x.dtype), a.bias_or_offs)


def _matmul_fake(*args: Any) -> torch.Tensor:
    a = Arguments(*args)
    n, packed = a.qdata.shape[-2:]
    columns = n if a.transpose_weight else packed * format_by_name(a.fmt).elems_per_byte
    return a.x.new_empty((*a.x.shape[:-1], columns))


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
            dy,
            qdata,
            scale,
            per_tensor_scale,
            None,
            ctx.fmt,
            not ctx.transpose_weight,
            *NO_ACTIVATION,
        )
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
    strided=("x",),
    setup_context=_save_packed,
    backward=_matmul_backward,
)


def _grouped_mm(*args: Any) -> torch.Tensor:
    a = Arguments(*args)
    offs = a.bias_or_offs
    if not a.x.is_cuda:
        reference.check_offsets(offs, len(a.x))
    x = fake_quantize_activation(a.x, a.activation, a.activation_mode, offs)
    w = a.values(x.dtype).mT
    if x.shape[0] == 0:
        return x.new_empty((0, w.shape[-1]))
    out = torch_internals.grouped_mm(aligned_rows(x), w, offs=offs).contiguous()
    zero_unassigned(out, offs)  # torch leaves unassigned rows unwritten
    return out


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _x, qdata, scale, per_tensor_scale, offs, fmt, transpose_weight, *_ = inputs
    ctx.save_for_backward(qdata, scale, per_tensor_scale, offs)
    ctx.fmt, ctx.transpose_weight = fmt, transpose_weight


def _grouped_mm_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    qdata, scale, per_tensor_scale, offs = ctx.saved_tensors
    dx = grouped_mm_op(
        dy, qdata, scale, per_tensor_scale, offs, ctx.fmt, not ctx.transpose_weight, *NO_ACTIVATION
    )
    # x, qdata, scale, per_tensor_scale, offs, fmt, transpose_weight, activation, activation_mode
    return dx, None, None, None, None, None, None, None, None


grouped_mm_op = define_op(
    "grouped_mm",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? per_tensor_scale, Tensor offs, str fmt,"
    " bool transpose_weight, str activation, str activation_mode) -> Tensor",
    cpu=_grouped_mm,
    cuda=_grouped_mm,
    fake=_matmul_fake,
    strided=("x",),
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
    strategy: str = "auto",
    max_scratch_bytes: int | None = None,
) -> torch.Tensor:
    """``x @ W^T + bias`` (or ``x @ W``) with a packed ``W [N, K]`` or ``[B, N, K]``; see the file's head.

    Computes in x's dtype (autocast's, under autocast), independent of the dtype that the weight had.

    Args:
        x: ``[..., K]`` (``[..., N]`` without ``transpose_weight``) for a 2-D weight, rank 1 or more;
            ``[B, M, K]`` for a 3-D one. bfloat16, float16 or float32.
        qdata: ``W``'s elements, as :func:`torchao_mx.ops.quantize` packs them along K.
        scale: ``W``'s block scales.
        fmt: the weight's format.
        per_tensor_scale: ``W``'s per-tensor scale, if the format has one.
        bias: ``[N]`` (``[K]`` without ``transpose_weight``), or one number, added to the product's rows.
        transpose_weight: reduce over K, the packed axis; otherwise over N.
        activation: how to quantize x first, in blocks along the reduced axis.
        strategy: how to compute on a GPU: ``"fused"``, ``"unpack"`` or ``"auto"`` (see
            :func:`torchao_mx.ops.packed_mm.strategy.choose_strategy`); for 2-D weights without an ``activation``.
        max_scratch_bytes: the decoded weight that ``"unpack"`` may hold at a time; at least one slice of 8
            rows or one block of columns. None: 256 MiB, or the size of the rows of x and of the result if
            that is more.

    Raises:
        TypeError: a wrong dtype of x.
        ValueError: shapes that do not multiply; a device other than the weight's; an ``activation`` whose
            blocks do not divide x's last axis; an unknown ``strategy``.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> qdata, scale = ops.quantize(torch.eye(32), MXFP4)
        >>> ops.matmul(torch.arange(32.0), qdata, scale, MXFP4)[-4:]
        tensor([28., 29., 30., 31.])
    """
    check_weight(qdata, scale, per_tensor_scale, fmt)
    reduced, columns = product_sizes(qdata, fmt, transpose_weight)
    x, _ = operands(x, None)
    check_product(x, qdata, reduced, activation)
    check_strategy(strategy, max_scratch_bytes)
    if qdata.dim() == 2 and activation is None:
        y, _ = mm_op(
            as_rows(x),
            qdata,
            scale,
            per_tensor_scale,
            dense_bias(bias, columns, x),
            None,
            None,
            None,
            None,
            1.0,
            fmt.name,
            transpose_weight,
            strategy,
            "",
            "",
            max_scratch_bytes or 0,
        )
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], columns)
    if strategy != "auto":
        raise ValueError(
            f"strategy={strategy!r} with {'a batch of weights' if activation is None else 'an activation'}"
            f"; these products have only one strategy: leave strategy out"
        )
    bias = None if bias is None else bias.to(x.dtype)
    args = (qdata, scale, per_tensor_scale, bias, fmt.name, transpose_weight)
    if qdata.dim() == 3:
        if x.dim() != 3 or x.shape[0] != qdata.shape[0]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; a weight of {qdata.shape[0]} matrices multiplies "
                f"x [{qdata.shape[0]}, M, {reduced}]: expand or reshape x"
            )
        return matmul_op(x, *args, *spec_strings(activation))
    out = matmul_op(as_rows(x), *args, *spec_strings(activation))
    return out.reshape(*x.shape[:-1], columns)


def grouped_mm(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: BlockFormat,
    offs: torch.Tensor,
    *,
    order: torch.Tensor | None = None,
    per_tensor_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    transpose_weight: bool = True,
    activation: QuantizeSpec | None = None,
    strategy: str = "auto",
    max_scratch_bytes: int | None = None,
) -> torch.Tensor:
    """Multiply rows ``offs[e - 1] : offs[e]`` by expert e of the packed ``W [E, N, K]``, and add its bias.

    Rows after ``offs[-1]`` are unassigned: they are zero in y and in x's gradient, and affect nothing else,
    not even the per-tensor scale of an NVFP4 ``activation``. Nothing waits for the GPU, so ``offs`` and
    ``order`` are not checked there: results are undefined if they break the rules below. Row numbers out of
    range never read foreign memory; offsets beyond the rows may, as in ``torch._grouped_mm``.

    Args:
        x: ``[R, K]`` (``[R, N]`` without ``transpose_weight``) in group order; ungrouped ``[T, K]``
            with an ``order``. bfloat16, float16 or float32.
        qdata, scale, fmt, per_tensor_scale: ``W``, as in :func:`matmul`.
        offs: ``[E]`` int32 end offsets on x's device, ascending, as in ``torch._grouped_mm``.
        order: ``[R]`` int32 (or int64, converted), a permutation of the rows (checked on the CPU only): row i
            belongs to token ``order[i] // (R // T)``. The argsort of the flattened ``[T, k]`` expert ids.
        bias: ``[E, N]`` (``[E, K]``).
        transpose_weight, activation, strategy, max_scratch_bytes: as in :func:`matmul`; on a GPU,
            ``"unpack"`` needs a bfloat16 x.

    Returns:
        ``[R, N]`` (``[R, K]``) in x's dtype.

    Raises:
        TypeError: a wrong dtype.
        ValueError: shapes or devices that do not match; on the CPU, ``offs`` that do not ascend or an ``order``
            that is not a permutation; an ``activation`` with axes that are not multiples of 16 bytes.

    Example:
        >>> import torch
        >>> from torchao_mx import MXFP4, ops
        >>> qdata, scale = ops.quantize(torch.stack([torch.eye(32), 2 * torch.eye(32)]), MXFP4)
        >>> offs = torch.tensor([1, 3], dtype=torch.int32)
        >>> ops.grouped_mm(torch.ones(4, 32), qdata, scale, MXFP4, offs)[:, 0]
        tensor([1., 2., 2., 0.])
    """
    check_weight(qdata, scale, per_tensor_scale, fmt)
    reduced, columns = product_sizes(qdata, fmt, transpose_weight)
    x, _ = operands(x, None)
    check_product(x, qdata, reduced, activation)
    offs, order = check_groups(x, qdata, offs, order, bias, columns)
    check_strategy(strategy, max_scratch_bytes)
    if activation is None:
        y, _ = mm_op(
            x,
            qdata,
            scale,
            per_tensor_scale,
            bias,
            None,
            None,
            offs,
            order,
            1.0,
            fmt.name,
            transpose_weight,
            strategy,
            "",
            "",
            max_scratch_bytes or 0,
        )
        return y
    if strategy != "auto":
        raise ValueError(
            f"strategy={strategy!r} with an activation; this product has only one strategy: leave "
            f"strategy out"
        )
    for size in (reduced, columns):
        if size * x.itemsize % 16:
            raise ValueError(
                f"the weight has an axis of {size}, in {x.dtype} not a multiple of 16 bytes, which "
                f"torch._grouped_mm needs for rows in forward and backward: pad the weight"
            )
    if order is not None:
        x = x[tokens_of(order, len(x))]
    y = grouped_mm_op(
        x,
        qdata,
        scale,
        per_tensor_scale,
        offs,
        fmt.name,
        transpose_weight,
        *spec_strings(activation),
    )
    if bias is None:
        return y
    expert = torch.searchsorted(offs, torch.arange(len(y), device=y.device), right=True)
    return y + F.pad(bias.to(y.dtype), (0, 0, 0, 1))[expert]  # nothing for unassigned rows
