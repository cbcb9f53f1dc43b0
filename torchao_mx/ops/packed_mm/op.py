"""mm: a frozen packed weight and a low-rank update, dense or by groups of rows, as one op.

For every expert e and its rows of x (one group of all rows if ``offs`` is None)::

    h = x down^T                  y  = x W^T + s h up^T + bias         (x W without transpose_weight)
    g = s dy up                   dx = dy W + g down                   (dy W^T)
    d_down = g^T x                d_up = s dy^T h                      dbias = sum of the rows of dy

where ``transpose_weight`` reduces over K, the packed axis of ``W [E, N, K]``: x ``[R, K]``, y ``[R, N]``,
down ``[E, r, K]``, up ``[E, N, r]``. Otherwise it reduces over N: x ``[R, N]``, y ``[R, K]``,
down ``[E, r, N]``, up ``[E, K, r]``. With an ``order``, x ``[T, ..]`` is gathered first, and dx summed last.

The adapters keep their dtype. Products cast them to x's dtype; their gradients are summed in fp32 and
returned in the adapters' dtype. Backward refers to the packed bytes and decodes them again; it keeps x only
if down is trained, and h ``[R, r]``. :func:`choose_strategy` chooses how the product is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from torchao_mx import reference
from torchao_mx.formats import format_by_name
from torchao_mx.ops.core.operands import Added, Packed, Rows
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.core.replay import replayed
from torchao_mx.ops.core.tiles import MAX_RANKS
from torchao_mx.ops.moe.gather import with_unit_rows
from torchao_mx.ops.moe.rows import rows_functions
from torchao_mx.ops.packed_mm import portable, unpack
from torchao_mx.ops.packed_mm.fp8.product import fp8_product
from torchao_mx.ops.packed_mm.hopper.product import hopper_product, takes_hopper, takes_hopper_fp8
from torchao_mx.ops.packed_mm.strategy import DEFAULT_SCRATCH, choose_strategy

# Dense products up to this many rows use our adapter kernels: a launch costs the host less than a torch.mm.
SKINNY_UP_TO = 512


def _packed(a: Arguments | BackwardArguments) -> Packed:
    return Packed(a.qdata, a.scale, a.per_tensor_scale, format_by_name(a.fmt))


class _DecodedOnDemand:
    """``W [E, N, K]`` for the reference, decoding one expert at a time on access."""

    def __init__(self, w: Packed, dtype: torch.dtype) -> None:
        self.w, self.dtype = w, dtype
        self.shape = (w.qdata.shape[0], w.n, w.k)

    def __getitem__(self, e: int) -> torch.Tensor:
        w, pts = self.w, self.w.per_tensor_scale
        pts = pts[e] if pts is not None and pts.dim() else pts
        return reference.dequantize(w.qdata[e], w.scale[e], w.fmt, self.dtype, -1, pts)


def _product(
    x: torch.Tensor,
    w: Packed,
    rows: Rows,
    transpose_weight: bool,
    added: Added,
    strategy: str,
    compute: str,
    max_scratch_bytes: int,
    token_sum: unpack.TokenSum | None = None,
) -> torch.Tensor:
    """Compute ``y = x W^T + scaling * h up^T + bias`` (``x W``), in forward and, transposed, in backward.

    With ``token_sum`` the rows of y are summed per token.
    """
    n_rows, columns = rows.n_rows, w.n if transpose_weight else w.k
    if n_rows == 0 or columns == 0:
        return x.new_empty((n_rows, columns))
    if added.bias is not None:
        added = added._replace(bias=added.bias.to(x.dtype))
    groups = None if rows.offs is None else rows.offs.shape[0]
    if max_scratch_bytes == 0:
        rows_bytes = n_rows * (w.n + w.k) * x.itemsize
        # Slices that are summed at once need no copy of y.
        allowed = rows_bytes if token_sum is None else rows_bytes * 2 // 3
        max_scratch_bytes = max(DEFAULT_SCRATCH, allowed)
    hopper = takes_hopper_fp8(x) if compute else takes_hopper(x, w.qdata, w.fmt)
    strategy = choose_strategy(
        strategy, compute, x.device, x.dtype, n_rows, groups, hopper, transpose_weight
    )
    if strategy == "unpack" and groups is not None:
        return unpack.grouped_product(
            x, w, rows, transpose_weight, added, max_scratch_bytes, token_sum
        )
    if strategy == "reference":
        if groups is None:
            values = reference.dequantize(w.qdata, w.scale, w.fmt, x.dtype, -1, w.per_tensor_scale)
        else:
            values = _DecodedOnDemand(w, x.dtype)
        y = reference.product(x, values, rows, transpose_weight, added)
    elif strategy == "unpack":
        y = unpack.dense_product(x, w, transpose_weight, added, max_scratch_bytes)
    elif compute:
        y = fp8_product(
            x,
            w,
            rows,
            transpose_weight,
            added,
            compute,
            max_scratch_bytes,
            fused=strategy == "fused8",
        )
    elif hopper:
        y = hopper_product(x, w.qdata, w.scale, rows, transpose_weight, added)
    else:
        y = portable.fused_product(x, w, rows, transpose_weight, added)
    return y if token_sum is None else rows_functions(y).sum_rows(y, *token_sum, None)


def _takes_torch_mm(x: torch.Tensor, r: int, offs: torch.Tensor | None) -> bool:
    """Whether the vendor's GEMM multiplies an adapter by the rows of ``x``, or computes its gradient."""
    many = x.shape[0] > SKINNY_UP_TO or r > MAX_RANKS
    return x.is_cuda and offs is None and many


def _low_rank(
    x: torch.Tensor, down: torch.Tensor, rows: Rows, scale_by: float = 1.0
) -> torch.Tensor:
    if _takes_torch_mm(x, down.shape[-2], rows.offs):
        return torch.mm(x, unpack.scaled_adapter(down, scale_by, x.dtype).to(x.dtype).t())
    return rows_functions(x).low_rank(x, down, *rows, scale_by=scale_by)


def _gram(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None,
    order: torch.Tensor | None,
    top_k: int,
    scaling: float,
    dtype: torch.dtype,
    transposed: bool,
) -> torch.Tensor:
    if not _takes_torch_mm(left, left.shape[1], offs):
        gram = rows_functions(left).gram
        return gram(left, right, offs, order, top_k, scaling, dtype, transposed)
    left = left if scaling == 1 else left * scaling
    first, second = (right, left) if transposed else (left, right)
    if dtype == torch.float32 != left.dtype:
        return torch.mm(first.t(), second, out_dtype=dtype)
    return torch.mm(first.t(), second).to(dtype)


class Arguments(NamedTuple):
    """``mm``'s arguments, in schema order; ``bias`` is ``[E, C]`` or ``[C]``, dtypes are names, "" for x's."""

    x: torch.Tensor
    qdata: torch.Tensor
    scale: torch.Tensor
    per_tensor_scale: torch.Tensor | None
    bias: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None
    offs: torch.Tensor | None
    order: torch.Tensor | None
    scaling: float
    fmt: str
    transpose_weight: bool
    strategy: str
    compute: str
    grad_compute: str
    max_scratch_bytes: int


def _mm(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a = Arguments(*args)
    x = with_unit_rows(a.x)
    if a.order is not None and not x.is_cuda:
        reference.check_order(a.order)
    rows = Rows.of(x, a.offs, a.order)
    h = None if a.down is None else _low_rank(x, a.down, rows)
    y = _product(
        x,
        _packed(a),
        rows,
        a.transpose_weight,
        Added(h, a.up, a.scaling, a.bias),
        a.strategy,
        a.compute,
        a.max_scratch_bytes,
    )
    return y, x.new_empty(0) if h is None else h


def _mm_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a = Arguments(*args)
    n_rows = a.x.shape[0] if a.order is None else a.order.shape[0]
    w = _packed(a)
    y = a.x.new_empty((n_rows, w.n if a.transpose_weight else w.k))
    return y, a.x.new_empty(0 if a.down is None else (n_rows, a.down.shape[-2]))


def _mm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    a, h = Arguments(*inputs), output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    needed = Arguments(*ctx.needs_input_grad[:-1])  # without the dispatcher's key set
    ctx.save_for_backward(
        a.x if needed.down else None,
        h if needed.up else None,
        a.qdata,
        a.scale,
        a.per_tensor_scale,
        a.down,
        a.up,
        a.offs,
        a.order,
    )
    ctx.n_tokens = a.x.shape[0]
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype
    takes = {"unpack8": bool(a.grad_compute), "fused8": a.grad_compute == "float8_e4m3fn"}
    strategy = a.strategy if takes.get(a.strategy, True) else "auto"
    ctx.options = (
        a.scaling,
        a.fmt,
        a.transpose_weight,
        strategy,
        a.grad_compute,
        a.max_scratch_bytes,
    )


def _mm_autograd(
    ctx: Any, dy: torch.Tensor | None, _dh: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    needed = Arguments(*ctx.needs_input_grad[:-1])
    dx = dbias = d_down = d_up = None
    if dy is not None:
        dx, dbias, d_down, d_up = mm_backward_op(
            dy,
            *ctx.saved_tensors,
            *ctx.options,
            needed.x,
            ctx.n_tokens,
            ctx.bias_dtype if needed.bias else None,
        )
    return (
        dx if needed.x else None,
        None, None, None,  # qdata, scale, per_tensor_scale
        dbias if needed.bias else None,
        d_down if needed.down else None,
        d_up if needed.up else None,
        None, None, None, None, None,  # offs, order, scaling, fmt, transpose_weight
        None, None, None, None,  # strategy, compute, grad_compute, max_scratch_bytes
    )  # fmt: skip


mm_op = define_op(
    "mm",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? per_tensor_scale, Tensor? bias, Tensor? down,"
    " Tensor? up, Tensor? offs, Tensor? order, float scaling, str fmt, bool transpose_weight,"
    " str strategy, str compute, str grad_compute, int max_scratch_bytes) -> (Tensor, Tensor)",
    cpu=_mm,
    cuda=replayed(_mm),
    fake=_mm_fake,
    strided=("x", "qdata", "scale", "down", "up"),
    setup_context=_mm_setup,
    backward=_mm_autograd,
)


class BackwardArguments(NamedTuple):
    """The arguments of ``mm_backward``: x if down is trained, h if up is, ``bias_dtype`` if bias is."""

    dy: torch.Tensor
    x: torch.Tensor | None
    h: torch.Tensor | None
    qdata: torch.Tensor
    scale: torch.Tensor
    per_tensor_scale: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None
    offs: torch.Tensor | None
    order: torch.Tensor | None
    scaling: float
    fmt: str
    transpose_weight: bool
    strategy: str
    compute: str
    max_scratch_bytes: int
    needs_dx: bool
    n_tokens: int
    bias_dtype: torch.dtype | None


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # dx, dbias, d_down, d_up


def _mm_backward(*args: Any) -> Gradients:
    a = BackwardArguments(*args)
    dy = with_unit_rows(a.dy)
    rows = Rows(a.offs, None, 1, dy.shape[0])
    top_k = 1 if a.order is None or a.n_tokens == 0 else rows.n_rows // a.n_tokens
    dx, dbias, d_down, d_up = (dy.new_empty(0) for _ in range(4))
    g = None
    if a.down is not None and (a.needs_dx or a.x is not None):
        g = _low_rank(dy, a.up.mT, rows, a.scaling)
    if a.needs_dx:
        added = Added() if a.down is None else Added(g, a.down.mT)
        token_sum = None if a.order is None else unpack.TokenSum(a.order, top_k)
        dx = _product(
            dy,
            _packed(a),
            rows,
            not a.transpose_weight,
            added,
            a.strategy,
            a.compute,
            a.max_scratch_bytes,
            token_sum,
        )
    # The adapters' own layout: `down` and `up` are transposed views unless the weight is transposed.
    if a.x is not None:
        x = with_unit_rows(a.x)
        d_down = _gram(g, x, a.offs, a.order, top_k, 1.0, a.down.dtype, not a.transpose_weight)
        d_down = d_down if a.transpose_weight else d_down.mT
    if a.h is not None:
        d_up = _gram(a.h, dy, a.offs, None, 1, a.scaling, a.up.dtype, a.transpose_weight)
        d_up = d_up if a.transpose_weight else d_up.mT
    if a.bias_dtype is not None:
        dbias = rows_functions(dy).group_sum(dy, a.offs, a.bias_dtype)
    return dx, dbias, d_down, d_up


def _mm_backward_fake(*args: Any) -> Gradients:
    a = BackwardArguments(*args)
    dy = a.dy

    def gradient(adapter: torch.Tensor) -> torch.Tensor:
        if a.transpose_weight:
            return dy.new_empty(adapter.shape, dtype=adapter.dtype)
        return dy.new_empty(adapter.mT.shape, dtype=adapter.dtype).mT

    dx, dbias, d_down, d_up = (dy.new_empty(0) for _ in range(4))
    if a.needs_dx:
        n_rows = dy.shape[0] if a.order is None else a.n_tokens
        w = _packed(a)
        dx = dy.new_empty((n_rows, w.k if a.transpose_weight else w.n))
    if a.bias_dtype is not None:
        lead = () if a.offs is None else a.offs.shape
        dbias = dy.new_empty((*lead, dy.shape[1]), dtype=a.bias_dtype)
    d_down = d_down if a.x is None else gradient(a.down)
    d_up = d_up if a.h is None else gradient(a.up)
    return dx, dbias, d_down, d_up


def _mm_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    a = BackwardArguments(*inputs)
    ctx.dtype, ctx.n_tokens, ctx.max_scratch_bytes = a.dy.dtype, a.n_tokens, a.max_scratch_bytes
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.qdata, a.scale, a.per_tensor_scale, a.down, a.up, a.offs, a.order)
    ctx.options = (a.scaling, a.fmt, a.transpose_weight, a.strategy)
    needed = BackwardArguments(*ctx.needs_input_grad[:-1])
    ctx.trains_adapters = needed.x or needed.down or needed.up


def _mm_backward_autograd(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """dx and dbias are linear in dy: their gradient with respect to dy is the forward product again."""
    ddx, ddbias, _dd_down, _dd_up = grads
    if ctx.trains_adapters:
        raise NotImplementedError(
            "mm has no second derivative with respect to adapters: freeze them with "
            ".requires_grad_(False), or compute the product from the dequantized weight"
        )
    ddy = None
    if ctx.needs_input_grad[0] and (ddx is not None or ddbias is not None):
        qdata, scale, per_tensor_scale, down, up, offs, order = ctx.saved_tensors
        if ddx is None:
            _scaling, fmt, transpose_weight, _strategy = ctx.options
            w = Packed(qdata, scale, per_tensor_scale, format_by_name(fmt))
            columns = w.k if transpose_weight else w.n
            ddx = ddbias.new_zeros((ctx.n_tokens, columns), dtype=ctx.dtype)
        ddy, _ = mm_op(
            ddx,
            qdata,
            scale,
            per_tensor_scale,
            ddbias,
            down,
            up,
            offs,
            order,
            *ctx.options,
            "",
            "",
            ctx.max_scratch_bytes,
        )
    return (ddy, *[None] * 18)  # dy only


mm_backward_op = define_op(
    "mm_backward",
    "(Tensor dy, Tensor? x, Tensor? h, Tensor qdata, Tensor scale, Tensor? per_tensor_scale,"
    " Tensor? down, Tensor? up, Tensor? offs, Tensor? order, float scaling, str fmt,"
    " bool transpose_weight, str strategy, str compute, int max_scratch_bytes, bool needs_dx,"
    " SymInt n_tokens, ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_mm_backward,
    cuda=replayed(_mm_backward),
    fake=_mm_backward_fake,
    strided=("dy", "x", "qdata", "scale", "down", "up"),
    setup_context=_mm_backward_setup,
    backward=_mm_backward_autograd,
)
