"""swiglu: an MLP's activation, between its up and its down product, in one pass.

With ``x [R, 2 C]`` the output of the up product, e a row's expert (one expert for all if ``offs`` is None),
and a clamp only if there is a limit::

    g', u' = halves of x + bias_e
    g, u   = min(g', limit), min(max(u', -limit), limit)
    y      = (u + up_offset) * g * s,   s = sigmoid(alpha * g)                           y [R, C]

    dg'    = dy * (u + up_offset) * (s + alpha * g * s * (1 - s))    where g' <= limit, else 0
    du'    = dy * g * s                                              where |u'| <= limit, else 0
    dbias  = sum of the rows of dx

in fp32, rounded once. Forward reads x and writes y; backward reads x and dy and writes dx. Nothing else is
kept. Alpha 1 without limit and offset is SwiGLU; gpt-oss has alpha 1.702, limit 7, offset 1, interleaved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from torchao_mx import reference
from torchao_mx.errors import HIGH_PRECISION_DTYPES, check_offs, check_on_device_of, check_tensors
from torchao_mx.ops.core.arguments import as_rows, operands
from torchao_mx.ops.core.launch import cdiv, launched, next_power_of_2, on_device_of
from torchao_mx.ops.core.register import define_op, no_second_derivative
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.core.tiles import SWIGLU
from torchao_mx.ops.moe import groups, narrow
from torchao_mx.ops.moe.gather import with_unit_rows


@triton.jit
def _tile_of_program(
    offs_ptr, n_rows, C, E, GROUPED: tl.constexpr, E_SPAN: tl.constexpr, TILE: tl.constexpr
):
    """Return (expert, first row, end of the expert's rows, first column of y) of a program."""
    column_tiles = tl.cdiv(C, TILE.columns)
    slot, tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    expert, first, end = groups.slot_rows(
        offs_ptr, n_rows, slot, E, E_SPAN, TILE.rows * TILE.steps, GROUPED
    )
    return tl.cast(expert, tl.int64), tl.cast(first, tl.int64), end, tile * TILE.columns


@triton.jit
def _load_halves(row_ptrs, inside, first, C, TILE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load (gate, up), in fp32, of the rows ``[2 C]`` that begin at ``row_ptrs``."""
    COLUMNS: tl.constexpr = TILE.columns
    if INTERLEAVED:
        column = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :]
        both = tl.load(row_ptrs + column, mask=(column < 2 * C) & inside, other=0.0)
        gate, up = tl.split(tl.reshape(both, (TILE.rows, COLUMNS, 2)))
    else:
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (column < C) & inside
        gate = tl.load(row_ptrs + column, mask=inside, other=0.0)
        up = tl.load(row_ptrs + C + column, mask=inside, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _load_bias(bias_ptr, expert, owned, first, C, TILE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load the expert's bias as :func:`_load_halves` loads x; zeros without a bias."""
    if bias_ptr is not None:
        # Every row loads it from L1: sharing one row's load would take shared memory and ten barriers.
        bias_ptrs = tl.broadcast_to(bias_ptr + expert * (2 * C), (TILE.rows, 1))
        gate, up = _load_halves(bias_ptrs, owned, first, C, TILE, INTERLEAVED)
    else:
        gate = 0.0
        up = 0.0
    return gate, up


@triton.jit
def _clamped(gate, up, limit, LIMITED: tl.constexpr):
    """Clamp by comparisons, which keep NaN, unlike a minimum."""
    if LIMITED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up


@launched
@triton.jit
def _swiglu_kernel(
    x_ptr,
    bias_ptr,
    offs_ptr,
    y_ptr,
    n_rows,
    C,
    E,
    stride_x,
    activation,
    GROUPED: tl.constexpr,
    E_SPAN: tl.constexpr,
    LIMITED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr,
):
    alpha, limit, up_offset = activation
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    STEPS: tl.constexpr = TILE.steps
    expert, first_row, end, first = _tile_of_program(offs_ptr, n_rows, C, E, GROUPED, E_SPAN, TILE)
    gate_bias, up_bias = _load_bias(bias_ptr, expert, expert < E, first, C, TILE, INTERLEAVED)
    column = first + tl.arange(0, COLUMNS)[None, :]
    for step in tl.static_range(STEPS):
        row = first_row + step * ROWS + tl.arange(0, ROWS)[:, None]
        owned = (row < end) & (expert < E)
        gate, up = _load_halves(x_ptr + row * stride_x, owned, first, C, TILE, INTERLEAVED)
        gate, up = _clamped(gate + gate_bias, up + up_bias, limit, LIMITED)
        y = (up + up_offset) * (gate * tl.sigmoid(alpha * gate))
        tl.store(
            y_ptr + row * C + column, y.to(y_ptr.dtype.element_ty), mask=(row < end) & (column < C)
        )


@launched
@triton.jit
def _swiglu_backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    offs_ptr,
    dx_ptr,
    n_rows,
    C,
    E,
    strides,
    activation,
    GROUPED: tl.constexpr,
    E_SPAN: tl.constexpr,
    LIMITED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr,
):
    stride_dy, stride_x = strides
    alpha, limit, up_offset = activation
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    STEPS: tl.constexpr = TILE.steps
    expert, first_row, end, first = _tile_of_program(offs_ptr, n_rows, C, E, GROUPED, E_SPAN, TILE)
    gate_bias, up_bias = _load_bias(bias_ptr, expert, expert < E, first, C, TILE, INTERLEAVED)
    column = first + tl.arange(0, COLUMNS)[None, :]
    for step in tl.static_range(STEPS):
        row = first_row + step * ROWS + tl.arange(0, ROWS)[:, None]
        owned = (row < end) & (expert < E)
        gate_in, up_in = _load_halves(x_ptr + row * stride_x, owned, first, C, TILE, INTERLEAVED)
        gate_in += gate_bias
        up_in += up_bias
        gate, up = _clamped(gate_in, up_in, limit, LIMITED)
        dy = tl.load(dy_ptr + row * stride_dy + column, mask=owned & (column < C), other=0.0)
        dy = dy.to(tl.float32)
        sigmoid = tl.sigmoid(alpha * gate)
        # In this order, a gate whose product with alpha overflows still has a finite slope.
        dgate = dy * (up + up_offset) * (sigmoid + alpha * (gate * (sigmoid * (1 - sigmoid))))
        dup = dy * (gate * sigmoid)
        if LIMITED:
            dgate = tl.where(gate_in <= limit, dgate, 0.0)
            dup = tl.where(tl.abs(up_in) <= limit, dup, 0.0)
        dgate = dgate.to(dx_ptr.dtype.element_ty)
        dup = dup.to(dx_ptr.dtype.element_ty)
        dx_ptrs = dx_ptr + row * (2 * C)
        if INTERLEAVED:
            both = tl.reshape(tl.join(dgate, dup), (ROWS, 2 * COLUMNS))
            columns = 2 * first + tl.arange(0, 2 * COLUMNS)[None, :]
            tl.store(dx_ptrs + columns, both, mask=(row < end) & (columns < 2 * C))
        else:
            mask = (row < end) & (column < C)
            tl.store(dx_ptrs + column, dgate, mask=mask)
            tl.store(dx_ptrs + C + column, dup, mask=mask)


def _grid_and_constants(
    x: torch.Tensor,
    offs: torch.Tensor | None,
    interleaved: bool,
    limit: float | None,
) -> tuple[tuple[int], dict[str, Any]]:
    n_groups = 0 if offs is None else offs.shape[0]
    slots = groups.max_slots(x.shape[0], n_groups, SWIGLU.rows * SWIGLU.steps)
    return (slots * cdiv(x.shape[1] // 2, SWIGLU.columns),), dict(
        GROUPED=offs is not None,
        E_SPAN=next_power_of_2(n_groups + 1),
        LIMITED=limit is not None,
        INTERLEAVED=interleaved,
        TILE=SWIGLU,
        num_warps=SWIGLU.warps,
    )


def _experts(
    bias: torch.Tensor | None, offs: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Return (bias, offs, E) in kernel form; without biases all experts count as one."""
    if bias is None:
        return None, None if offs is None else offs[-1:], 1
    return bias, offs, 1 if offs is None else offs.shape[0]


def _swiglu_triton(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    offs: torch.Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
) -> torch.Tensor:
    y = x.new_empty((x.shape[0], x.shape[1] // 2))
    if y.numel() != 0:
        x = with_unit_rows(x)
        bias, offs, n_experts = _experts(bias, offs)
        grid, constants = _grid_and_constants(x, offs, interleaved, limit)
        with on_device_of(x):
            _swiglu_kernel[grid](
                x,
                bias,
                offs,
                y,
                *y.shape,
                n_experts,
                x.stride(0),
                (alpha, limit or 0.0, up_offset),
                **constants,
            )
    return y


def _swiglu_fake(x: torch.Tensor, *_rest: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _swiglu_autograd(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_x, needs_bias, *_ = ctx.needs_input_grad
    dx, dbias = swiglu_backward_op(dy, *ctx.saved_tensors, *ctx.options, needs_bias)
    return (
        dx if needs_x else None,
        dbias if needs_bias else None,
        None, None, None, None, None,  # offs, interleaved, alpha, limit, up_offset
    )  # fmt: skip


swiglu_op = define_op(
    "swiglu",
    "(Tensor x, Tensor? bias, Tensor? offs, bool interleaved, float alpha, float? limit,"
    " float up_offset) -> Tensor",
    cpu=reference.swiglu,
    cuda=replayed(_swiglu_triton),
    fake=_swiglu_fake,
    strided=("x",),
    setup_context=_swiglu_setup,
    backward=_swiglu_autograd,
)


def _swiglu_backward_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    offs: torch.Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
    needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = x.new_empty(x.shape)
    if dx.numel() != 0:
        dy, x = with_unit_rows(dy), with_unit_rows(x)
        rows_bias, rows_offs, n_experts = _experts(bias, offs)
        grid, constants = _grid_and_constants(x, rows_offs, interleaved, limit)
        with on_device_of(x):
            _swiglu_backward_kernel[grid](
                dy,
                x,
                rows_bias,
                rows_offs,
                dx,
                *dy.shape,
                n_experts,
                (dy.stride(0), x.stride(0)),
                (alpha, limit or 0.0, up_offset),
                **constants,
            )
    if not needs_dbias:
        return dx, dx.new_empty(0)
    return dx, narrow.group_sum(dx, offs, bias.dtype)


def _swiglu_backward_cpu(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    offs: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    *options, needs_dbias = options
    dx = reference.swiglu_backward(dy, x, bias, offs, *options)
    if not needs_dbias:
        return dx, dx.new_empty(0)
    return dx, reference.group_sum(dx, offs, bias.dtype)


def _swiglu_backward_fake(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    needs_dbias = rest[-1]
    dbias = bias.new_empty(bias.shape) if needs_dbias else x.new_empty(0)
    return x.new_empty(x.shape), dbias


swiglu_backward_op = define_op(
    "swiglu_backward",
    "(Tensor dy, Tensor x, Tensor? bias, Tensor? offs, bool interleaved, float alpha, float? limit,"
    " float up_offset, bool needs_dbias) -> (Tensor, Tensor)",
    cpu=_swiglu_backward_cpu,
    cuda=replayed(_swiglu_backward_triton),
    fake=_swiglu_backward_fake,
    strided=("dy", "x"),
    backward=no_second_derivative(
        "swiglu", "write the activation with torch's own operations instead"
    ),
)


def swiglu(
    x: torch.Tensor,
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    bias: torch.Tensor | None = None,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``(up + up_offset) * gate * sigmoid(alpha * gate)`` of the halves of ``x + bias``; see the file's head.

    The defaults are SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202). gpt-oss's
    activation has ``interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0``.

    Computes in fp32 and rounds to x's dtype (autocast's, under autocast). Differentiable in x and the bias,
    whose gradient is summed in fp32; a clamp passes gradients within its bounds, bounds included. NaN stays
    NaN. Kept for backward are x, the bias and ``offs``.

    Args:
        x: ``[..., 2 C]``, rank 1 or more, or ``[R, 2 C]`` with ``offs``; bfloat16, float16 or float32.
        interleaved: True: gates are the even columns of x, ups the odd ones; False: its first and its last C.
        alpha: the factor inside the sigmoid; a finite number.
        limit: bounds gates above, and ups on both sides; positive, or None for no clamp.
        up_offset: added to ups after the clamp; a finite number.
        bias: ``[2 C]`` (``[E, 2 C]`` with ``offs``), added to x; bfloat16, float16 or float32, whatever x's
            dtype.
        offs: ``[E]`` int32 end offsets on x's device, ascending; expert e owns rows ``offs[e - 1] : offs[e]``.
            Rows after ``offs[-1]`` are unassigned: y and gradients are zero there, whatever x holds. The values
            are checked on the CPU only.

    Returns:
        ``[..., C]`` in x's dtype.

    Raises:
        TypeError: a wrong dtype; an ``alpha``, ``limit`` or ``up_offset`` that is not a number.
        ValueError: shapes or devices that do not match; numbers out of range.
        NotImplementedError: a second derivative.

    Example:
        >>> import torch
        >>> from torchao_mx import ops
        >>> x = torch.tensor([0.0, 9.0, 5.0, 3.0])  # gates 0 and 9, ups 5 and 3
        >>> ops.swiglu(x)
        tensor([ 0.0000, 26.9967])
        >>> ops.swiglu(x, interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0)  # gates 0 and 5
        tensor([ 0.0000, 19.9960])
    """
    x, _ = operands(x, None)
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis must hold as many gates as ups: an even number "
            f"of columns, at least 2"
        )
    _check_numbers(alpha, limit, up_offset)
    if offs is not None:
        _check_rows(x, offs)
    if bias is not None:
        _check_bias(x, bias, offs)
    limit = None if limit is None else float(limit)
    y = swiglu_op(as_rows(x), bias, offs, interleaved, float(alpha), limit, float(up_offset))
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _check_numbers(alpha: float, limit: float | None, up_offset: float) -> None:
    for name, value in (("alpha", alpha), ("up_offset", up_offset), ("limit", limit)):
        if not isinstance(value, (int, float)) and (value is not None or name != "limit"):
            raise TypeError(
                f"{name} is a {type(value).__name__}; it must be a Python number: call .item() on a tensor "
                f"once, outside the training loop"
            )
        if name != "limit" and not abs(value) < math.inf:
            raise ValueError(f"{name}={value}; it must be a finite number")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit}; it must be a positive number, or None for no clamp")


def _check_rows(x: torch.Tensor, offs: torch.Tensor) -> None:
    check_tensors(offs=offs)
    if x.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and offs {tuple(offs.shape)}; with experts they must be [R, 2 C] and "
            f"[E], E at least 1: flatten x's leading axes, or leave offs out"
        )
    check_offs(offs, x)


def _check_bias(x: torch.Tensor, bias: torch.Tensor, offs: torch.Tensor | None) -> None:
    check_tensors(bias=bias)
    if bias.dtype not in HIGH_PRECISION_DTYPES:
        raise TypeError(
            f"bias has dtype {bias.dtype}; it must be bfloat16, float16 or float32: convert it with "
            f".to(torch.bfloat16)"
        )
    check_on_device_of(x, bias, "bias")
    shape = [*([] if offs is None else offs.shape), x.shape[-1]]
    if list(bias.shape) != shape:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and x {tuple(x.shape)}, "
            f"{'without' if offs is None else 'with'} offs; the bias must be {shape}"
        )
