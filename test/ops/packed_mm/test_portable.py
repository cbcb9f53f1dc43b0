"""The fused product against float64 products with the reference's decoded weights, into poisoned memory."""

import pytest
import torch
from _grids import FORMATS, as_bytes, assert_same_values, generator, name_of, relative_error

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, reference
from torchao_mx.ops.core.operands import Packed
from torchao_mx.ops.core.tiles import PORTABLE_TILES
from torchao_mx.ops.packed_mm import portable
from torchao_mx.reference import Added, Rows

# The only dtype that the interpreter multiplies rightly is float32.
EACH_DTYPE = [
    pytest.param("interpreter", torch.float32, id="interpreter"),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=name_of(dtype))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]
each_dtype = pytest.mark.parametrize(("device", "dtype"), EACH_DTYPE)
one_dtype = pytest.mark.parametrize(("device", "dtype"), EACH_DTYPE[:2])  # fewer kernels to compile
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
each_direction = pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # numpy's, on NaN by design
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

# Against float64, for operands and results rounded to the dtype.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1.5e-3}

# End offsets (None: dense) and rows.
ROUTINGS = {
    "dense": (None, 37),
    "dense_one_row": (None, 1),
    "dense_no_rows": (None, 0),
    "one_expert": ([21], 21),
    "ragged": ([7, 40, 41], 41),
    "empty_experts": ([0, 33, 33], 33),
    "one_row": ([0, 1, 1], 1),
    "trailing_rows": ([5, 5, 18], 40),
    "trailing_rows_only": ([0, 0, 0], 9),
    "no_rows": ([0, 0, 0], 0),
    "whole_tiles": ([32, 64, 192], 192),
}
TILES = sorted({tile for table in PORTABLE_TILES.values() for _, tile in table})


@pytest.fixture(autouse=True)
def here(request):
    if request.node.callspec.params["device"] == "interpreter" and torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process, not interpreted")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def on(device, t):
    return t.to(device) if device == "cuda" and isinstance(t, torch.Tensor) else t


def packed(fmt, *shape, per_expert=True, seed=1):
    """``(qdata, scale, per-tensor scale, fmt)`` of random values whose blocks differ in magnitude."""
    g = generator(seed)
    w = torch.randn(shape, generator=g).unflatten(-1, (-1, fmt.block_size))
    w = w * torch.exp2(torch.randint(-4, 5, (*w.shape[:-1], 1), generator=g))
    w, pts = w.flatten(-2), None
    if fmt.has_per_tensor_scale:
        pts = reference.per_tensor_scale(w, fmt, per_expert and len(shape) == 3)
    return (*reference.quantize(w, fmt, per_tensor_scale=pts), pts, fmt)


def values(w, dtype):
    """Decoded to ``dtype``, in float64."""
    qdata, scale, pts, fmt = w
    return reference.dequantize(qdata, scale, fmt, dtype, per_tensor_scale=pts).double()


def operands(routing, dtype, fmt, transpose_weight, n, k, *, top_k=None, rank=0, bias=False):
    """The arguments of ``product``, on the CPU."""
    ends, n_rows = ROUTINGS[routing]
    lead = () if ends is None else (len(ends),)
    offs = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    order = None if top_k is None else torch.randperm(n_rows, generator=generator(5)).int()
    columns, reduced = (n, k) if transpose_weight else (k, n)
    x = randn(n_rows // (top_k or 1), reduced, dtype=dtype)
    h = randn(n_rows, rank, dtype=dtype, seed=2) if rank else None
    up = randn(*lead, columns, rank, seed=3) * n**0.5 if rank else None  # stays float32
    b = randn(*lead, columns, dtype=dtype, seed=4) * n if bias else None
    w = packed(fmt, *lead, n, k)
    return (x, *w, offs, order, top_k or 1, n_rows, transpose_weight, h, up, 0.375, b)


def expected(args):
    x, *w, offs, order, top_k, n_rows, transpose_weight, h, up, scaling, bias = args
    w = values(w, x.dtype)
    w = w if transpose_weight else w.mT
    rows = x.double() if order is None else x.double()[order.long() // top_k]
    y = torch.zeros(n_rows, w.shape[-2], dtype=torch.float64)
    ends = [n_rows] if offs is None else offs.tolist()
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = slice(start, end)
        y[own] = rows[own] @ (w if offs is None else w[e]).mT
        if h is not None:
            u = up.to(x.dtype).double()
            y[own] += scaling * h[own].double() @ (u if offs is None else u[e]).mT
        if bias is not None:
            y[own] += bias.double() if bias.dim() == 1 else bias[e].double()
    return y


def product(args):
    """``fused_product`` of what ``operands`` returned."""
    x, *w, offs, order, top_k, n_rows, transpose_weight, h, up, scaling, bias = args
    rows, added = Rows(offs, order, top_k, n_rows), Added(h, up, scaling, bias)
    return portable.fused_product(x, Packed(*w), rows, transpose_weight, added)


def fused(device, args):
    return product([on(device, a) for a in args])


def check(device, args):
    y, wanted = fused(device, args), expected(args)
    assert y.dtype == args[0].dtype and y.is_contiguous()
    if device == "cuda":
        assert torch.equal(fused(device, args), y)  # deterministic
    y = y.cpu()
    assert y.shape == wanted.shape
    nobody = wanted.abs().sum(1) == 0
    assert (y[nobody] == 0).all()
    if not nobody.all():
        assert relative_error(y, wanted) < BOUNDS[y.dtype]
        worst = (y.double() - wanted)[~nobody].norm(dim=1) / wanted[~nobody].norm(dim=1)
        assert worst.max() < 3 * BOUNDS[y.dtype]


@one_dtype
@each_format
@each_direction
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(device, dtype, fmt, transpose_weight, routing):
    check(device, operands(routing, dtype, fmt, transpose_weight, 72, 96))


@each_dtype
@each_format
@each_direction
@pytest.mark.parametrize("routing", ["dense", "empty_experts", "trailing_rows", "no_rows"])
def test_everything_at_once(device, dtype, fmt, transpose_weight, routing):
    _, n_rows = ROUTINGS[routing]
    top_k = 1 if n_rows % 2 else 2
    args = operands(
        routing, dtype, fmt, transpose_weight, 72, 96, top_k=top_k, rank=8, bias=True
    )  # fmt: skip
    check(device, args)


@one_dtype
@each_direction
@pytest.mark.parametrize("rank", [1, 16, 40, 130])
def test_ranks(device, dtype, transpose_weight, rank):
    check(device, operands("ragged", dtype, MXFP4, transpose_weight, 64, 64, rank=rank))


@one_dtype
@each_format
@each_direction
@pytest.mark.parametrize(("n", "k"), [(1, 32), (77, 32), (128, 256), (136, 288)])
def test_sizes(device, dtype, fmt, transpose_weight, n, k):
    check(device, operands("trailing_rows", dtype, fmt, transpose_weight, n, k, bias=True))


@each_dtype
@each_direction
def test_half_a_block_pair(device, dtype, transpose_weight):
    """NVFP4 rows of 8 bytes modulo 16."""
    check(device, operands("ragged", dtype, NVFP4, transpose_weight, 48, 144))


@one_dtype
@each_direction
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, tile)))
def test_every_tile(device, dtype, transpose_weight, tile, monkeypatch):
    """Results depend on no tile nor on how the values are dealt out, whatever GPU it is meant for."""
    monkeypatch.setattr(portable, "portable_tile", lambda *args: tile)
    args = operands("ragged", dtype, MXFP4, transpose_weight, 136, 160, rank=8, bias=True)
    check(device, args)


@each_dtype
@pytest.mark.parametrize("n_rows", [20, 60, 100])
def test_every_average_of_rows(device, dtype, n_rows):
    """Tables reach from few rows a group to many; the first and the last rows of groups are right."""
    args = list(operands("ragged", dtype, MXFP4, True, 128, 128))
    args[0] = randn(3 * n_rows, 128, dtype=dtype)
    args[5] = torch.tensor([n_rows - 1, 2 * n_rows + 5, 3 * n_rows], dtype=torch.int32)
    args[8] = 3 * n_rows
    check(device, tuple(args))


@each_dtype
@each_direction
@pytest.mark.parametrize("per_expert", [True, False], ids=["expert", "tensor"])
def test_per_tensor_scales(device, dtype, transpose_weight, per_expert):
    args = list(operands("ragged", dtype, NVFP4, transpose_weight, 64, 64))
    args[1:5] = packed(NVFP4, 3, 64, 64, per_expert=per_expert)
    if per_expert:
        args[3] = args[3] * torch.tensor([1.0, 8.0, 0.25]).view(3, 1, 1)
    check(device, tuple(args))


VIEWS = {
    "experts": lambda t: t[1:4],
    "every_other_expert": lambda t: t[::2],
    "rows": lambda t: t[:3, 16:80],
    "every_other_row": lambda t: t[:3, ::2],
    "columns": lambda t: t[:3, :, t.shape[2] // 4 : t.shape[2] // 2],
}


@one_dtype
@each_format
@each_direction
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_weight(device, dtype, fmt, transpose_weight, view):
    """Slices as MXTensor hands them over, also where words of them are not aligned."""
    qdata, scale, pts, _ = packed(fmt, 5, 96, 4 * (48 if fmt is NVFP4 else 32), per_expert=False)
    qdata, scale = (VIEWS[view](on(device, t)) for t in (qdata, scale))
    n, k = qdata.shape[1], qdata.shape[2] * fmt.elems_per_byte
    args = list(operands("ragged", dtype, fmt, transpose_weight, n, k))
    args[1:4] = qdata.cpu(), scale.cpu(), pts
    there = [on(device, a) for a in args]
    there[1:3] = qdata, scale
    y = product(there)
    assert relative_error(y.cpu(), expected(args)) < BOUNDS[dtype]


@one_dtype
@each_direction
def test_strides_of_the_others(device, dtype, transpose_weight):
    args = list(operands("ragged", dtype, MXFP4, transpose_weight, 64, 96, rank=12, bias=True))
    x, up, bias = args[0], args[11], args[13]
    wanted = expected(args)
    args = [on(device, a) for a in args]
    wide = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=dtype)
    wide[:, 1:-2] = x
    for other_x in (on(device, wide)[:, 1:-2], on(device, x.t().contiguous()).t()):
        args[0] = other_x
        args[11] = on(device, up.mT.contiguous()).mT
        args[13] = on(device, bias.repeat_interleave(2, 1))[:, ::2]
        y = product(args).cpu()
        assert relative_error(y, wanted) < BOUNDS[dtype]


@one_dtype
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_one_bias_for_all_experts(device, dtype, bias_dtype):
    args = list(operands("trailing_rows", dtype, MXFP4, True, 64, 64))
    args[13] = (64 * randn(64, seed=4)).to(torch.bfloat16).to(bias_dtype)  # exact in all three
    check(device, tuple(args))


@each_dtype
@each_format
@each_direction
def test_decodes_as_dequantize_does(device, dtype, fmt, transpose_weight):
    """The product with an identity is the decoded weight, bit for bit, under all but extreme scales."""
    if fmt is NVFP4:
        byte = torch.arange(8, 127)
    else:
        byte = torch.arange(118, 132) if dtype == torch.float16 else torch.arange(20, 230)
    n, k = len(byte), 64
    code = torch.randint(0, 256, (n, k // fmt.elems_per_byte), generator=generator())
    if fmt.elem_bits == 8:
        code = code & 0xF7 & (0xFF if fmt is MXFP8_E4M3 else 0xBF)  # no NaN, no Inf
    qdata = code.to(torch.uint8).view(fmt.qdata_dtype)
    scale = byte.to(torch.uint8)[:, None].repeat(1, k // fmt.block_size).view(fmt.scale_dtype)
    pts = torch.tensor(0.37) if fmt is NVFP4 else None
    x = torch.eye(k if transpose_weight else n, dtype=dtype)
    args = (
        x,
        qdata,
        scale,
        pts,
        fmt,
        None,
        None,
        1,
        len(x),
        transpose_weight,
        None,
        None,
        1.0,
        None,
    )
    y = fused(device, args).cpu()
    wanted = reference.dequantize(qdata, scale, fmt, dtype, per_tensor_scale=pts)
    assert_same_values((y.mT if transpose_weight else y).contiguous() + 0, wanted + 0)


@each_dtype
@each_direction
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=name_of)
def test_nan_scales(device, dtype, transpose_weight, fmt):
    args = list(operands("dense", dtype, fmt, transpose_weight, 48, 160))
    as_bytes_view = args[2].view(torch.uint8)
    as_bytes_view[5, 1] = 0xFF if fmt is MXFP4 else 0x7F
    y, wanted = fused(device, args).cpu(), expected(args)
    assert wanted.isnan().any() and not wanted.isnan().all()
    assert torch.equal(y.isnan(), wanted.isnan())


@each_dtype
@each_direction
def test_smallest_scale(device, dtype, transpose_weight):
    """E8M0 byte 0 is 2**-127, not zero: large x show it."""
    if dtype == torch.float16:
        pytest.skip("out of range")
    args = list(operands("dense", dtype, MXFP4, transpose_weight, 32, 64))
    args[0] = (args[0].double() * 2.0**100).to(dtype)
    args[2].view(torch.uint8).fill_(0)
    w = reference.dequantize(*args[1:3], MXFP4, torch.float32).double()
    wanted = args[0].double() @ (w.mT if transpose_weight else w)
    assert relative_error(fused(device, args).cpu(), wanted) < BOUNDS[dtype]


@one_dtype
@each_direction
def test_swapped_nibbles_would_show(device, dtype, transpose_weight):
    args = list(operands("ragged", dtype, MXFP4, transpose_weight, 64, 64))
    y = fused(device, args).cpu()
    args[1] = (args[1] << 4) | (args[1] >> 4)
    assert relative_error(y, expected(args)) > 0.3
    check(device, args)


@one_dtype
def test_operands_are_left_alone(device, dtype):
    args = operands("ragged", dtype, MXFP4, True, 64, 64, top_k=1, rank=8, bias=True)
    there = [on(device, a) for a in args]
    product(there)
    for before, after in zip(args, there, strict=True):
        if isinstance(before, torch.Tensor):
            assert torch.equal(as_bytes(before), as_bytes(after.cpu()))


@pytest.mark.gpu
@each_direction
@pytest.mark.parametrize("device", ["cuda"])
def test_weights_past_2_31_elements(device, transpose_weight):
    """The last expert's rows, and the offsets of its words."""
    e, n, k = 17, 16384, 8192
    qdata = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device=device)
    scale = torch.randint(118, 128, (e, n, k // 32), dtype=torch.uint8, device=device)
    scale = scale.view(MXFP4.scale_dtype)
    offs = torch.zeros(e, dtype=torch.int32, device=device)
    offs[-1] = 24
    x = randn(24, k if transpose_weight else n, dtype=torch.bfloat16).to(device)
    w, rows = Packed(qdata, scale, None, MXFP4), Rows(offs, None, 1, 24)
    y = portable.fused_product(x, w, rows, transpose_weight, Added())
    w = reference.dequantize(qdata[-1], scale[-1], MXFP4, torch.float32).double()
    wanted = x.double() @ (w.mT if transpose_weight else w)
    assert relative_error(y, wanted) < BOUNDS[x.dtype]


@pytest.mark.gpu
@each_direction
@pytest.mark.parametrize("device", ["cuda"])
def test_results_past_2_31_elements(device, transpose_weight):
    columns, reduced = 16384, 32
    n_rows = 2**31 // columns + 40
    shape = (columns, reduced) if transpose_weight else (reduced, columns)
    w = packed(MXFP4, *shape)
    x = randn(n_rows, reduced, dtype=torch.bfloat16)
    args = (x, *w, None, None, 1, n_rows, transpose_weight, None, None, 1.0, None)
    y = fused(device, args)
    some = torch.tensor([0, 1, n_rows // 2, n_rows - 65, n_rows - 2, n_rows - 1])
    decoded = values(w, x.dtype)
    wanted = x[some].double() @ (decoded.mT if transpose_weight else decoded)
    assert relative_error(y[some.to(device)].cpu(), wanted) < BOUNDS[x.dtype]
