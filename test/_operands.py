"""A call of every op, and the layouts that a tensor with the same values can have."""

from typing import NamedTuple

import torch
from _grids import as_bytes, randn, relative_error

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, ops
from torchao_mx.ops.core.register import implementations

E, N, K, RANK = 3, 96, 64, 5
T, TOP_K = 6, 2
R = T * TOP_K
ENDS = [3, 3, 9]  # an expert without rows, and rows of no expert
ORDER = [0, 5, 1, 4, 2, 6, 3, 7, 8, 11, 10, 9]  # tokens 5 and, in part, 4 are unassigned
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """``op(*args)``; ``unassigned`` names the rows that influence nothing: of an argument, or of a result."""

    op: object
    args: tuple
    unassigned: dict  # argument -> index of what is of no expert
    zero: dict  # result -> index of what is zero then

    @property
    def tensors(self):
        return {
            a.name: i
            for i, a in enumerate(self.op._schema.arguments)
            if isinstance(self.args[i], torch.Tensor)
        }

    def run(self, device="cpu", **replaced):
        """By the entry of ``device``; "interpreter" is that of CUDA on the CPU."""
        args = list(self.args)
        for name, t in replaced.items():
            args[self.tensors[name]] = t
        if device == "interpreter":  # without the dispatcher, which resolves these
            args = [a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args]
            out = implementations[self.op, "cuda"](*args)
        else:
            out = self.op(*args)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    def to(self, device):
        args = (a.to(device) if isinstance(a, torch.Tensor) else a for a in self.args)
        return self._replace(args=tuple(args))


# --- layouts --------------------------------------------------------------------------------------


def _poison(*shape, like):
    """NaN, or bytes of ones."""
    if like.dtype.is_floating_point and like.itemsize > 1:
        return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)
    value = 0xFF if like.itemsize == 1 else 0x7F7F7F7F
    kind = torch.uint8 if like.itemsize == 1 else like.dtype
    return torch.full(shape, value, dtype=kind, device=like.device).view(like.dtype)


def _copied(into, t):
    """``into``, of other strides, with t's values."""
    one_byte = t.itemsize == 1
    (into.view(torch.uint8) if one_byte else into).copy_(t.view(torch.uint8) if one_byte else t)
    return into


def strided(t):
    return _copied(_poison(*t.shape[:-1], 2 * t.shape[-1], like=t)[..., ::2], t)


def rows_apart(t):
    return _copied(_poison(*t.shape[:-1], t.shape[-1] + 3, like=t)[..., 1:-2], t)


def offset(t):
    """Dense, an element behind the start of its memory."""
    return _copied(_poison(t.numel() + 1, like=t)[1:].view(t.shape), t)


def transposed(t):
    return t.mT.contiguous().mT


def leading_axes_swapped(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def negated(t):
    """By a bit that torch looks at (``t.is_neg()``), the memory holding the negatives."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def layouts_of(t):
    """Functions of ``t`` to an equal tensor."""
    if t.dim() == 0:
        return [offset]
    found = [strided, rows_apart, offset]
    if t.dim() > 1:
        found.append(transposed)
    if t.dim() > 2:
        found.append(leading_axes_swapped)
    if t.dtype == torch.float32:
        found.append(negated)
    return found


def expanded_axes(case, name):
    """Axes along which an argument may be one value repeated."""
    t = case.args[case.tensors[name]]
    if name in ("offs", "order", "index") or t.itemsize == 1:
        return []
    return [axis for axis in range(t.dim()) if t.shape[axis] > 1]


def expanded(t, axis):
    return t.narrow(axis, 0, 1).expand(t.shape)


# --- cases ----------------------------------------------------------------------------------------


def _weight(fmt, *lead):
    w = randn(*lead, N, K, seed=1) / 16
    pts = ops.per_tensor_scale(w, fmt, bool(lead)) if fmt.has_per_tensor_scale else None
    return (*ops.quantize(w, fmt, per_tensor_scale=pts), pts)


def _quantizers(dtype):
    op = torch.ops.torchao_mx
    x, x3 = randn(N, K).to(dtype), randn(E, N, K).to(dtype)
    for fmt in (MXFP4, MXFP8_E4M3, NVFP4):
        pts = ops.per_tensor_scale(x, fmt) if fmt.has_per_tensor_scale else None
        pts3 = ops.per_tensor_scale(x3, fmt, True) if fmt.has_per_tensor_scale else None
        spec = (fmt.name, "rceil")
        yield f"quantize-{fmt}", op.quantize, (x, *spec, -1, pts)
        yield f"quantize_columns-{fmt}", op.quantize, (x, *spec, -2, pts)
        yield f"quantize_experts-{fmt}", op.quantize, (x3, *spec, -1, pts3)
        yield f"quantize_with_values-{fmt}", op.quantize_with_values, (x, *spec, dtype, pts)
        yield f"fake_quantize-{fmt}", op.fake_quantize, (x, *spec, -1, pts)
        yield f"fake_quantize_columns-{fmt}", op.fake_quantize, (x3, *spec, -2, pts3)
        packed = ops.quantize(x3, fmt, per_tensor_scale=pts3)
        for axis in (-1, -2):
            args = (*packed, fmt.name, dtype, axis, pts3)
            yield f"dequantize{axis}-{fmt}", op.dequantize, args
    yield "per_tensor_scale", op.per_tensor_scale, (x, "nvfp4", False, None)
    yield "per_tensor_scale_experts", op.per_tensor_scale, (x3, "nvfp4", True, None)
    forms = ["rows", "row_values", "columns", "column_values"]
    row_scale = torch.tensor(0.01)
    for fmt, pts, seed in ((MXFP8_E4M3, None, torch.tensor(5)), (NVFP4, row_scale, None)):
        spec = (fmt.name, "rceil")
        args = (x, *spec, *spec, forms, dtype, pts, pts, seed, None)
        yield f"quantize_both-{fmt}", op.quantize_both, args
    a = (*ops.quantize(x, MXFP8_E4M3), None)
    b = (*ops.quantize(x3[1], MXFP8_E4M3), None)
    names = (MXFP8_E4M3.name,) * 2
    yield "block_scaled_mm", op.block_scaled_mm, (*a, *b, *names, dtype)


def _activations(dtype):
    op = torch.ops.torchao_mx
    tail = (True, 1.702, 7.0, 1.0)
    ends = torch.tensor(ENDS, dtype=torch.int32)
    x, dy = randn(R, 2 * N, seed=2).to(dtype), randn(R, N, seed=3).to(dtype)
    for name, bias, offs in (("experts", randn(E, 2 * N), ends), ("dense", randn(2 * N), None)):
        rows = {} if offs is None else {"x": slice(ENDS[-1], None)}
        zero = {} if offs is None else {0: slice(ENDS[-1], None)}
        yield f"swiglu-{name}", op.swiglu, (x, bias, offs, *tail), rows, zero
        rows = rows and rows | {"dy": slice(ENDS[-1], None)}
        args = (dy, x, bias, offs, *tail, True)
        yield f"swiglu_backward-{name}", op.swiglu_backward, args, rows, zero


def _dense(dtype, fmts, strategies, compute=""):
    op = torch.ops.torchao_mx
    x, dy = randn(R, K, seed=2).to(dtype) / 16, randn(R, N, seed=3).to(dtype) / 16
    down, up = randn(RANK, K, seed=4) / 16, randn(N, RANK, seed=5) / 16
    for fmt in fmts:
        w = _weight(fmt)
        for transpose_weight in (True, False):
            xs, ys = (x, dy) if transpose_weight else (dy, x)
            adapters = (down, up) if transpose_weight else (up.mT, down.mT)
            adapters = tuple(t.contiguous() for t in adapters)
            bias = randn(ys.shape[1], seed=6) / 16
            h = (xs.float() @ adapters[0].mT).to(dtype)
            for strategy, scratch in strategies:
                way = f"{strategy}{scratch or ''}-{fmt}-{'wt' if transpose_weight else 'w'}"
                tail = (1.5, fmt.name, transpose_weight, strategy, compute)
                args = (xs, *w, bias, *adapters, None, None, *tail, compute, scratch)
                yield f"mm-{way}", op.mm, args
                args = (
                    ys,
                    xs,
                    h,
                    *w,
                    *adapters,
                    None,
                    None,
                    *tail,
                    scratch,
                    True,
                    R,
                    torch.float32,
                )
                yield f"mm_backward-{way}", op.mm_backward, args
            if compute:
                continue
            for spec in (("", ""), ("mxfp8_e4m3", "rceil"), ("nvfp4", "rceil")):
                args = (xs, *w, bias.to(dtype), fmt.name, transpose_weight, *spec)
                yield f"matmul-{fmt}-{spec[0]}-{transpose_weight}", op.matmul, args


def _grouped(dtype, fmts, strategies, compute=""):
    op = torch.ops.torchao_mx
    offs, order = torch.tensor(ENDS).int(), torch.tensor(ORDER).int()
    beyond = slice(ENDS[-1], None)
    down, up = randn(E, RANK, K, seed=4) / 16, randn(E, N, RANK, seed=5) / 16
    for fmt in fmts:
        w = _weight(fmt, E)
        for transpose_weight in (True, False):
            for gathered in (False, True):
                reduced, columns = (K, N) if transpose_weight else (N, K)
                x = randn(T if gathered else R, reduced, seed=2).to(dtype) / 16
                dy = randn(R, columns, seed=3).to(dtype) / 16
                adapters = (down, up) if transpose_weight else (up.mT, down.mT)
                adapters = tuple(t.contiguous() for t in adapters)
                bias = randn(E, columns, seed=6) / 16
                h = (torch.randn(R, RANK, generator=torch.manual_seed(7)) / 16).to(dtype)
                groups = (offs, order if gathered else None)
                x_rows = 5 if gathered else beyond
                for strategy, scratch in strategies:
                    way = f"{strategy}{scratch or ''}-{fmt}-{'wt' if transpose_weight else 'w'}"
                    way += "-order" if gathered else ""
                    tail = (1.5, fmt.name, transpose_weight, strategy, compute)
                    args = (x, *w, bias, *adapters, *groups, *tail, compute, scratch)
                    yield f"mm_grouped-{way}", op.mm, args, {"x": x_rows}, {0: beyond, 1: beyond}
                    args = (
                        dy,
                        x,
                        h,
                        *w,
                        *adapters,
                        *groups,
                        *tail,
                        scratch,
                        True,
                        len(x),
                        torch.float32,
                    )
                    rows = {"dy": beyond, "x": x_rows, "h": beyond}
                    yield f"mm_grouped_backward-{way}", op.mm_backward, args, rows, {0: x_rows}
            if compute:
                continue
            for spec in (("", ""), ("mxfp8_e4m3", "rceil"), ("nvfp4", "rceil")):
                args = (
                    randn(R, reduced, seed=2).to(dtype),
                    *w,
                    offs,
                    fmt.name,
                    transpose_weight,
                    *spec,
                )
                name = f"grouped_mm-{fmt}-{spec[0]}-{transpose_weight}"
                yield name, op.grouped_mm, args, {"x": beyond}, {0: beyond}


def _rows(dtype):
    op = torch.ops.torchao_mx
    offs, order = torch.tensor(ENDS).int(), torch.tensor(ORDER).int()
    beyond = slice(ENDS[-1], None)
    slots = torch.zeros(R, dtype=torch.bool)
    slots[ORDER[ENDS[-1] :]] = True
    slots = slots.view(T, TOP_K)
    y, dout = randn(R, K).to(dtype), randn(T, K, seed=1).to(dtype)
    weights = torch.rand(T, TOP_K, generator=torch.manual_seed(2))
    rows = {"y": beyond, "weights": slots}
    yield "combine", op.combine, (y, weights, order, offs), rows, {0: 5}
    args = (dout, y, weights, order, offs)
    yield "combine_backward", op.combine_backward, args, rows, {0: beyond, 1: slots}
    yield "combine_all", op.combine, (y, weights, order, None), {}, {}
    dy, x = randn(R, N, seed=3).to(dtype), randn(R, K, seed=4).to(dtype)
    yield "group_sum", op.group_sum, (dy, offs, torch.float32), {"dy": beyond}, {}
    args = (dy, x, offs, torch.float32)
    yield "group_outer", op.group_outer, args, {"dy": beyond, "x": beyond}, {}
    args = (x, "nvfp4", False, offs)
    yield "per_tensor_scale_grouped", op.per_tensor_scale, args, {"x": beyond}, {}
    index = torch.tensor([0, 1, 2, *[-1] * 29, *range(3, 9), *[-1] * 26]).int()
    spec = ("mxfp8_e4m3", "rceil")
    forms = ["columns", "column_values"]
    args = (x, "", "", *spec, forms, dtype, None, None, None, index)
    yield "quantize_both_index", op.quantize_both, args, {"x": beyond}, {}
    a, b = ops.quantize(x, MXFP8_E4M3), ops.quantize(randn(E, N, K), MXFP8_E4M3)
    args = (*a, None, *b, None, randn(E, N).to(dtype), offs, MXFP8_E4M3.name, dtype)
    rows = {"a_scale": beyond}
    yield "grouped_block_scaled_mm", op.grouped_block_scaled_mm, args, rows, {0: beyond}


def _recipe(dtype):
    op = torch.ops.torchao_mx
    x, w, bias = randn(R, K).to(dtype), randn(N, K, seed=1), randn(N, seed=2)
    both = ("nvfp4", "rceil", "mxfp8_e4m3", "rceil")
    yield "recipe_linear", op.recipe_linear, (x, w, bias, *both, False, True)
    _, *columns = op.recipe_linear(x, w, bias, *both, False, True)
    spec = ("mxfp8_e4m3", "rceil")
    args = (randn(R, N).to(dtype), w, *columns, torch.tensor(3), *spec, *spec, False)
    args = (*args, torch.float32, torch.float32)
    yield "recipe_linear_backward", op.recipe_linear_backward, args


def _mxfp4_products(rows):
    x, w = (ops.quantize(randn(rows, K, seed=s).bfloat16(), MXFP4) for s in (0, 1))
    bias = randn(rows).bfloat16()
    yield "mxfp4_product", torch.ops.torchao_mx.mxfp4_product, (*x, *w, bias)


ANY_STRATEGY = (("auto", 0), ("unpack", 0), ("unpack", 5000))
FORMATS = (MXFP4, MXFP8_E4M3, NVFP4)
WAYS_OF_THE_GPU = (("fused", 0), ("unpack", 0), ("unpack", 5000))
EIGHT_BITS = (("fused8", 0), ("unpack8", 0), ("unpack8", 5000))


def cases(dtype, strategies, eight_bits=(), formats=FORMATS):
    """Case by name: of every op, in every way that it has."""
    found = [
        *_quantizers(dtype), *_activations(dtype), *_rows(dtype), *_recipe(dtype),
        *_mxfp4_products(N), *_dense(dtype, formats, strategies), *_grouped(dtype, formats, strategies),
    ]  # fmt: skip
    for way in eight_bits:
        found += _dense(torch.bfloat16, (MXFP4,), (way,), "float8_e4m3fn")
        found += _grouped(torch.bfloat16, (MXFP4,), (way,), "float8_e4m3fn")
    table = {}
    for name, op, args, *rows in found:
        unassigned, zero = rows or ({}, {})
        table[name] = Case(op.default, args, unassigned, zero)
    return table


# --- comparing ------------------------------------------------------------------------------------


def check_equal(actual, expected, name):
    """Packed forms by their bytes, values within what the order of sums may change."""
    assert len(actual) == len(expected), name
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), f"{name}: result {i}"
        if not a.dtype.is_floating_point or a.itemsize == 1:
            assert torch.equal(as_bytes(a), as_bytes(e)), f"{name}: result {i}"
        elif e.isfinite().all() and e.any():
            error = relative_error(a, e)
            assert error <= BOUND[a.dtype], f"{name}: result {i} is off by {error:.2e}"
        else:
            assert torch.equal(a.nan_to_num(0.5), e.nan_to_num(0.5)), f"{name}: result {i}"


def check_owned(results, inputs, name):
    """No result is a view, nor in the memory of another one or of an argument."""
    ours, others = (
        [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
        for tensors in (results, inputs)
    )
    assert len({*ours} - {*others}) == len(ours), f"{name}: shared memory"
    for i, t in enumerate(results):
        assert not t._is_view() and t._base is None, f"{name}: result {i} is a view"
        size = t.untyped_storage().nbytes()
        assert t.storage_offset() == 0 and size == t.numel() * t.itemsize, f"{name}: result {i}"
