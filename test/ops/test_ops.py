"""The public ops: what they refuse, how they compile, and their gradients against float64."""

import pytest
import torch
from _grids import (
    DTYPES,
    FORMAT_MODES,
    FORMATS,
    RCEIL,
    as_bytes,
    assert_close,
    assert_same_bytes,
    assert_same_values,
    name_of,
    quantized,
    randn,
    refusals,
    relative_error,
)
from expecttest import assert_expected_inline
from torch.library import opcheck

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, QuantizeSpec, ops

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
each_format_and_mode = pytest.mark.parametrize(("fmt", "mode"), FORMAT_MODES, ids=name_of)
each_direction = pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])

OPS = torch.ops.torchao_mx
R, K, N, E = 7, 64, 96, 4  # rows, reduced, output, experts


def scale_for(x, fmt, per_expert=False):
    return ops.per_tensor_scale(x, fmt, per_expert) if fmt.has_per_tensor_scale else None


def packed_weight(fmt, *lead, seed=1):
    """(qdata, scale, per-tensor scale) of ``[*lead, N, K]``, and its values in float64."""
    w = randn(*lead, N, K, seed=seed)
    pts = scale_for(w, fmt, per_expert=bool(lead))
    qdata, scale = ops.quantize(w, fmt, per_tensor_scale=pts)
    values = ops.dequantize(qdata, scale, fmt, torch.float32, per_tensor_scale=pts)
    return (qdata, scale, pts), values.double()


# --- quantizing -----------------------------------------------------------------------------------


@each_format
@each_dtype
def test_values_in_another_dtype(fmt, dtype):
    """Quantized from x's own dtype, decoded to the product's: mixed precision."""
    for source in DTYPES:
        x = randn(32, 64, dtype=source)
        pts = scale_for(x, fmt)
        qdata, scale, values = ops.quantize_with_values(x, fmt, dtype=dtype, per_tensor_scale=pts)
        expected = ops.dequantize(qdata, scale, fmt, dtype, per_tensor_scale=pts)
        assert_same_values(values, expected)


@each_format
@pytest.mark.parametrize("axis", [-1, -2])
def test_straight_through_gradient(fmt, axis):
    x = torch.cat([randn(32, 64), torch.full((32, 64), 1e30)]).requires_grad_()
    dy = randn(64, 64, seed=1)
    pts = scale_for(x, fmt)
    ops.fake_quantize(x, fmt, axis=axis, per_tensor_scale=pts).backward(dy)
    assert_same_bytes(x.grad, dy)  # saturated values included
    x.grad = None
    ops.fake_quantize(x.mT, fmt, axis=axis, per_tensor_scale=pts).backward(dy)
    assert_same_bytes(x.grad, dy.mT)


def test_quantize_is_not_differentiable():
    x = randn(4, 64).requires_grad_()
    assert not any(t.requires_grad for t in ops.quantize(x, NVFP4))
    assert not any(t.requires_grad for t in ops.quantize_with_values(x, MXFP4))
    assert not ops.per_tensor_scale(x, NVFP4).requires_grad


# --- what torch.compile needs to know -------------------------------------------------------------


def op_cases():
    x, rows = randn(96, 64), randn(5, K)
    offs = torch.tensor([2, 2, 4, 5], dtype=torch.int32)
    for fmt in (MXFP4, MXFP8_E4M3, NVFP4):
        pts = scale_for(x, fmt)
        (qdata, scale, w_pts), _ = packed_weight(fmt)
        (qdata_E, scale_E, pts_E), _ = packed_weight(fmt, E)
        name, act = fmt.name, (MXFP8_E4M3.name, RCEIL.value)
        yield f"quantize-{fmt}", OPS.quantize, (x, name, "rceil", -1, pts)
        yield f"quantize_columns-{fmt}", OPS.quantize, (x[None], name, "rceil", -2, pts)
        args = (x, name, "rceil", torch.bfloat16, pts)
        yield f"quantize_with_values-{fmt}", OPS.quantize_with_values, args
        args = (qdata, scale, name, torch.bfloat16, -1, w_pts)
        yield f"dequantize-{fmt}", OPS.dequantize, args
        args = (qdata_E, scale_E, name, torch.float32, -2, pts_E)
        yield f"dequantize_columns-{fmt}", OPS.dequantize, args
        args = (x.clone().requires_grad_(), name, "rceil", -1, pts)
        yield f"fake_quantize-{fmt}", OPS.fake_quantize, args
        args = (x.t().clone().t().requires_grad_(), name, "rceil", -2, pts)
        yield f"fake_quantize_columns-{fmt}", OPS.fake_quantize, args
        w, bias = (qdata, scale, w_pts), randn(N).requires_grad_()
        args = (rows.clone().requires_grad_(), *w, bias, name, True, *act)
        yield f"matmul-{fmt}", OPS.matmul, args
        args = (randn(5, N).requires_grad_(), *w, None, name, False, "", "")
        yield f"matmul_w-{fmt}", OPS.matmul, args
        w = (qdata_E, scale_E, pts_E)
        args = (randn(E, 5, K).requires_grad_(), *w, bias, name, True, "", "")
        yield f"matmul_batch-{fmt}", OPS.matmul, args
        args = (rows.clone().requires_grad_(), *w, offs, name, True, *act)
        yield f"grouped_mm-{fmt}", OPS.grouped_mm, args
        args = (randn(5, N).requires_grad_(), *w, offs, name, False, "", "")
        yield f"grouped_mm_w-{fmt}", OPS.grouped_mm, args


OP_CASES = {name: (op.default, args) for name, op, args in op_cases()}


def to(device, args):
    """The arguments with their tensors there, leaves of autograd as before."""
    moved = [a.detach().to(device) if isinstance(a, torch.Tensor) else a for a in args]
    for old, new in zip(args, moved, strict=True):
        if isinstance(old, torch.Tensor):
            new.requires_grad_(old.requires_grad)
    return tuple(moved)


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck(case, device):
    op, args = OP_CASES[case]
    args = to(device, args)
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    float8 = any(isinstance(a, torch.Tensor) and a.dtype.itemsize == 1 for a in args)
    if not float8:  # its allclose lacks kernels for these dtypes; see the next test
        utils.append("test_schema")
    opcheck(op, args, test_utils=utils)


@pytest.mark.parametrize("case", OP_CASES)
def test_ops_leave_their_arguments_alone(case, device):
    op, args = OP_CASES[case]
    args = to(device, args)
    tensors = [a.detach() for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    out = op(*args)
    for tensor, kept in zip(tensors, before, strict=True):
        assert_same_bytes(tensor, kept)
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    for result in out if isinstance(out, tuple) else (out,):
        assert result.untyped_storage().data_ptr() not in storages


# --- products -------------------------------------------------------------------------------------

ACTIVATIONS = [None, QuantizeSpec(MXFP8_E4M3), QuantizeSpec(MXFP4), QuantizeSpec(NVFP4)]
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)


def reduced(transpose_weight):
    return K if transpose_weight else N


def check_gradients(x, bias, y, expected, dy, dx, atol_rows=None):
    """``y`` and the gradients it sends to x and bias against float64."""
    assert_close(y, expected)
    y.backward(dy)
    assert_close(x.grad, dx)
    assert relative_error(2 * x.grad, dx) > 0.9  # the comparison is no formality
    if bias is not None:
        assert_close(bias.grad, dy.double().flatten(0, -2).sum(0) if dy.dim() > 1 else dy)


@each_format
@each_direction
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_matmul(fmt, transpose_weight, rank, with_bias, device):
    packed, w = packed_weight(fmt)
    qdata, scale, pts = to(device, packed)
    w = (w.mT if transpose_weight else w).to(device)  # [reduced, out]
    x = randn(*(2, 3, R)[4 - rank :], reduced(transpose_weight)).to(device).requires_grad_()
    bias = randn(w.shape[1], seed=2).to(device).requires_grad_() if with_bias else None
    y = ops.matmul(
        x, qdata, scale, fmt, per_tensor_scale=pts, bias=bias, transpose_weight=transpose_weight
    )
    expected = x.detach().double() @ w + (bias.detach().double() if with_bias else 0)
    dy = randn(*y.shape, seed=3).to(device)
    check_gradients(x, bias, y, expected, dy, dy.double() @ w.mT)


@each_format
@each_activation
def test_matmul_quantizes_its_activation(fmt, activation):
    (qdata, scale, pts), w = packed_weight(fmt)
    x, bias = randn(R, K).requires_grad_(), randn(N, seed=2).requires_grad_()
    y = ops.matmul(x, qdata, scale, fmt, per_tensor_scale=pts, bias=bias, activation=activation)
    expected = quantized(x, activation).double() @ w.mT + bias.detach().double()
    dy = randn(R, N, seed=3)
    check_gradients(x, bias, y, expected, dy, dy.double() @ w)  # straight through


@each_format
@each_direction
@each_activation
def test_matmul_of_batches(fmt, transpose_weight, activation):
    (qdata, scale, pts), w = packed_weight(fmt, E)
    w = w.mT if transpose_weight else w
    x = randn(E, R, reduced(transpose_weight)).requires_grad_()
    bias = randn(w.shape[-1], seed=2).requires_grad_()
    y = ops.matmul(
        x, qdata, scale, fmt, per_tensor_scale=pts, bias=bias, transpose_weight=transpose_weight,
        activation=activation,
    )  # fmt: skip
    dy = randn(*y.shape, seed=3)
    expected = quantized(x, activation).double() @ w + bias.detach().double()
    check_gradients(x, bias, y, expected, dy, dy.double() @ w.mT)


@each_dtype
def test_matmul_computes_in_xs_dtype(dtype):
    (qdata, scale, _), w = packed_weight(MXFP4)
    x, bias = randn(R, K, dtype=dtype).requires_grad_(), randn(N, seed=2).requires_grad_()
    y = ops.matmul(x, qdata, scale, MXFP4, bias=bias)
    assert y.dtype == dtype
    dy = randn(R, N, dtype=dtype, seed=3)
    y.backward(dy)
    assert_close(y, x.detach().double() @ w.mT + bias.detach().double())
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)
    assert_close(x.grad, dy.double() @ w)
    assert_close(bias.grad, dy.double().sum(0), dtype)


def test_matmul_under_autocast():
    (qdata, scale, _), w = packed_weight(MXFP4)
    x, bias = randn(R, K).requires_grad_(), randn(N, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.matmul(x, qdata, scale, MXFP4, bias=bias)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    assert_close(x.grad, torch.ones(R, N).double() @ w, torch.bfloat16)


@each_direction
@each_activation
def test_products_without_rows(transpose_weight, activation):
    kwargs = dict(transpose_weight=transpose_weight, activation=activation)
    out = N if transpose_weight else K
    (qdata, scale, _), _w = packed_weight(MXFP4)
    for shape in ((0,), (2, 0), (0, 3)):
        x = torch.zeros(*shape, reduced(transpose_weight), requires_grad=True)
        bias = torch.zeros(out, requires_grad=True)
        y = ops.matmul(x, qdata, scale, MXFP4, bias=bias, **kwargs)
        assert y.shape == (*shape, out)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert bias.grad.eq(0).all()
    (qdata, scale, _), _w = packed_weight(MXFP4, E)
    x = torch.zeros(0, reduced(transpose_weight), requires_grad=True)
    y = ops.grouped_mm(x, qdata, scale, MXFP4, torch.zeros(E, dtype=torch.int32), **kwargs)
    assert y.shape == (0, out)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(E, 1, N), (E, R, N), (1, N)], ids=str)
def test_a_bias_of_more_axes_is_refused_or_right(shape):
    """Before the product runs; not by a failing backward pass."""
    (qdata, scale, _), w = packed_weight(MXFP4, E)
    x, bias = randn(E, R, K).requires_grad_(), randn(*shape, seed=2).requires_grad_()
    try:
        y = ops.matmul(x, qdata, scale, MXFP4, bias=bias)
    except ValueError:
        return
    dy = randn(E, R, N, seed=3)
    y.backward(dy)
    assert_close(y, x.detach().double() @ w.mT + bias.detach().double())
    assert_close(bias.grad, dy.double().sum_to_size(shape))


@pytest.mark.parametrize("needs", ["x", "bias"])
def test_only_one_input_needs_its_gradient(needs):
    (qdata, scale, _), _w = packed_weight(MXFP4)
    x, bias = randn(R, K), randn(N)
    {"x": x, "bias": bias}[needs].requires_grad_()
    ops.matmul(x, qdata, scale, MXFP4, bias=bias).sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (needs == "x", needs == "bias")


def test_matmul_twice_differentiable():
    """A gradient penalty: the gradient with respect to x is linear in dy."""
    (qdata, scale, _), w = packed_weight(MXFP4)
    x, dy = randn(R, K).requires_grad_(), randn(R, N, seed=3).requires_grad_()
    (dx,) = torch.autograd.grad(ops.matmul(x, qdata, scale, MXFP4), x, dy, create_graph=True)
    seed = randn(R, K, seed=4)
    dx.backward(seed)
    assert_close(dy.grad, seed.double() @ w.mT)


GROUPS = {
    "even": [2, 4, 6, 8],
    "empty_first": [0, 3, 6, 8],
    "empty_middle": [3, 3, 3, 8],
    "empty_last": [1, 8, 8, 8],
    "one": [0, 8, 8, 8],
}


@each_format
@each_direction
@pytest.mark.parametrize("groups", GROUPS)
def test_grouped_mm(fmt, transpose_weight, groups, device):
    check_grouped_mm(fmt, transpose_weight, GROUPS[groups], None, device)


@each_direction
@each_activation
def test_grouped_mm_quantizes_its_activation(transpose_weight, activation, device):
    check_grouped_mm(MXFP4, transpose_weight, GROUPS["empty_middle"], activation, device)


def check_grouped_mm(fmt, transpose_weight, ends, activation, device):
    packed, w = packed_weight(fmt, E)
    qdata, scale, pts = to(device, packed)
    w = (w.mT if transpose_weight else w).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # torch._grouped_mm's own
    x = randn(ends[-1], reduced(transpose_weight), dtype=dtype).to(device).requires_grad_()
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    y = ops.grouped_mm(
        x, qdata, scale, fmt, offs, per_tensor_scale=pts, transpose_weight=transpose_weight,
        activation=activation,
    )  # fmt: skip
    expert = torch.repeat_interleave(torch.tensor(ends).diff(prepend=torch.tensor([0])))
    dy = randn(*y.shape, dtype=dtype, seed=3).to(device)
    xq = quantized(x, activation).double()
    expected = torch.einsum("rk,rkn->rn", xq, w[expert].to(dtype).double())
    dx = torch.einsum("rn,rkn->rk", dy.double(), w[expert].to(dtype).double())
    check_gradients(x, None, y, expected, dy, dx)


@pytest.mark.parametrize("rows", [1, 8])
def test_grouped_mm_takes_operands_of_any_strides(rows):
    """torch._grouped_mm refuses expanded ones, and a lone row whose stride is no multiple."""
    (qdata, scale, _), w = packed_weight(MXFP4, E)
    offs = torch.tensor([0, 0, rows, rows], dtype=torch.int32)
    for x in (randn(K).expand(rows, -1), randn(K, rows).t(), randn(rows, K + 3)[:, 1 : K + 1]):
        x = x.detach().requires_grad_()
        y = ops.grouped_mm(x, qdata, scale, MXFP4, offs)
        assert_close(y, x.detach().double() @ w[2].mT)
        for dy in (torch.ones(()).expand(rows, N), randn(N).expand(rows, -1), randn(N, rows).t()):
            (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
            assert_close(dx, dy.double() @ w[2])


def test_products_on_meta():
    """Shapes without data; operands on two devices are refused."""
    (qdata, scale, _), _w = packed_weight(MXFP4)
    x = randn(R, K).to("meta")
    assert ops.matmul(x, qdata.to("meta"), scale.to("meta"), MXFP4).shape == (R, N)
    with pytest.raises(ValueError, match="x is on meta and the weight on cpu"):
        ops.matmul(x, qdata, scale, MXFP4)


# --- what is refused ------------------------------------------------------------------------------


def test_refusals_of_quantizing():
    x, pts = torch.ones(32, 64), torch.ones(())
    q = ops.quantize
    assert_expected_inline(
        refusals(
            [
                lambda: q(x, "mxfp4"),
                lambda: q(x, MXFP4, "rceil"),
                lambda: q(x, MXFP4, axis=0),
                lambda: q(x.double(), MXFP4),
                lambda: q(x.int(), MXFP4),
                lambda: q(x[:, :40], MXFP4),
                lambda: q(x[:31], NVFP4, axis=-2),
                lambda: q(x[:0], MXFP4),
                lambda: q(x[0], MXFP4, axis=-2),
                lambda: q(torch.tensor(1.0), MXFP4),
                lambda: q(x, MXFP4, per_tensor_scale=pts),
                lambda: q(x, NVFP4, per_tensor_scale=pts.double()),
                lambda: q(x, NVFP4, per_tensor_scale=torch.ones(2, 1, 1)),
                lambda: q(x[None], NVFP4, per_tensor_scale=torch.ones(1)),
                lambda: ops.quantize_with_values(x, MXFP4, dtype=torch.float64),
            ]
        ),
        """\
TypeError: fmt='mxfp4' is not a BlockFormat; use one from torchao_mx, such as MXFP4
TypeError: scaling_mode='rceil' is not a ScaleCalculationMode; use one of ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL, ScaleCalculationMode.CEIL, ScaleCalculationMode.EVEN
ValueError: axis=0; blocks run along the last axis (-1) or the one before it (-2): move yours there with torch.movedim
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
TypeError: x has dtype torch.int32; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (32, 40); its axis -1 (40) is not a multiple of 32, the block size of mxfp4: pad it, or leave this layer out with filter_fn
ValueError: x has shape (31, 64); its axis -2 (31) is not a multiple of 16, the block size of nvfp4: pad it, or leave this layer out with filter_fn
ValueError: x has shape (0, 64); block formats need dimensions above zero: skip empty tensors before quantizing
ValueError: x has shape (64,); axis=-2 needs at least 2 dimension(s): unsqueeze it
ValueError: x has shape (); axis=-1 needs at least 1 dimension(s): unsqueeze it
ValueError: mxfp4 has no per-tensor scale; leave per_tensor_scale out
TypeError: per_tensor_scale has dtype torch.float64; it must be float32: use .float()
ValueError: per_tensor_scale has shape (2, 1, 1); it must be 0-d, or [E, 1, 1] for x [E, M, K]: x has shape (32, 64)
ValueError: per_tensor_scale has shape (1,); it must be 0-d, or [E, 1, 1] for x [E, M, K]: x has shape (1, 32, 64)
TypeError: the output has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first""",
    )
    for args, kwargs in (((x[:, :40], MXFP4), {}), ((x.double(), NVFP4), {"axis": -2})):
        messages = [
            refusals([lambda f=f, a=args, k=kwargs: f(*a, **k)])
            for f in (ops.quantize, ops.fake_quantize)
        ]
        assert messages[0] == messages[1]


def test_refusals_of_dequantize():
    d, (qdata, scale) = ops.dequantize, ops.quantize(torch.ones(32, 64), MXFP4)
    assert_expected_inline(
        refusals(
            [
                lambda: d(qdata, scale, "mxfp4"),
                lambda: d(qdata, scale, MXFP4, torch.float64),
                lambda: d(qdata, scale, MXFP4, axis=1),
                lambda: d(qdata, as_bytes(scale), MXFP4),
                lambda: d(qdata, scale, MXFP8_E4M3),
                lambda: d(qdata[:8], scale, MXFP4),
                lambda: d(qdata[:, :16], scale, MXFP4),
                lambda: d(qdata, scale, MXFP4, per_tensor_scale=torch.ones(())),
            ]
        ),
        """\
TypeError: fmt='mxfp4' is not a BlockFormat; use one from torchao_mx, such as MXFP4
TypeError: the output has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: axis=1; blocks run along the last axis (-1) or the one before it (-2): move yours there with torch.movedim
TypeError: mxfp4 needs qdata of dtype torch.uint8 and scale of dtype torch.float8_e8m0fnu; got torch.uint8 and torch.uint8: reinterpret bytes with .view(dtype)
TypeError: mxfp8_e4m3 needs qdata of dtype torch.float8_e4m3fn and scale of dtype torch.float8_e8m0fnu; got torch.uint8 and torch.float8_e8m0fnu: reinterpret bytes with .view(dtype)
ValueError: qdata has shape (8, 32) and scale (32, 2); in mxfp4 a scale covers 16 bytes of the last axis and the other axes are equal: pass the two results of one quantize
ValueError: qdata has shape (32, 16) and scale (32, 2); in mxfp4 a scale covers 16 bytes of the last axis and the other axes are equal: pass the two results of one quantize
ValueError: mxfp4 has no per-tensor scale; leave per_tensor_scale out""",
    )


def test_refusals_of_products():
    (qdata, scale, _), _w = packed_weight(MXFP4)
    (qdata_E, scale_E, _), _w = packed_weight(MXFP4, E)
    x, offs = randn(R, K), torch.tensor([1, 2, 3, R], dtype=torch.int32)
    spec = QuantizeSpec(MXFP4)
    mm, gmm = ops.matmul, ops.grouped_mm
    assert_expected_inline(
        refusals(
            [
                lambda: mm(x.double(), qdata, scale, MXFP4),
                lambda: mm(x[:, :32], qdata, scale, MXFP4),
                lambda: mm(torch.tensor(1.0), qdata, scale, MXFP4),
                lambda: mm(x, qdata, scale, MXFP4, transpose_weight=False),
                lambda: mm(x, qdata_E, scale_E, MXFP4),
                lambda: mm(randn(R, 40), qdata[:40], scale[:40], MXFP4, transpose_weight=False,
                           activation=spec),
                lambda: gmm(x, qdata, scale, MXFP4, offs),
                lambda: gmm(x[None], qdata_E, scale_E, MXFP4, offs),
                lambda: gmm(x, qdata_E, scale_E, MXFP4, offs[:3]),
                lambda: gmm(x, qdata_E, scale_E, MXFP4, offs.long()),
                lambda: gmm(x[:, 1:], qdata_E, scale_E, MXFP4, offs),
            ]
        ),
        """\
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (7, 32); the weight reduces over 64 elements, which x's last axis must have
ValueError: x has shape (); the weight reduces over 64 elements, which x's last axis must have
ValueError: x has shape (7, 64); the weight reduces over 96 elements, which x's last axis must have
ValueError: x has shape (7, 64); a weight of 4 matrices multiplies x [4, M, 64]: expand or reshape x
ValueError: x has shape (7, 40); its last axis (40) is not a multiple of 32, the block size of mxfp4
ValueError: x has shape (7, 64), the weight (96, 32) (packed) and offs (4,); a grouped product takes x [R, K], a weight [E, N, K] and offs [E]
ValueError: x has shape (1, 7, 64), the weight (4, 96, 32) (packed) and offs (4,); a grouped product takes x [R, K], a weight [E, N, K] and offs [E]
ValueError: x has shape (7, 64), the weight (4, 96, 32) (packed) and offs (3,); a grouped product takes x [R, K], a weight [E, N, K] and offs [E]
TypeError: offs has dtype torch.int64; end offsets are int32: use offs.int()
ValueError: x has shape (7, 63); the weight reduces over 64 elements, which x's last axis must have""",
    )  # fmt: skip
