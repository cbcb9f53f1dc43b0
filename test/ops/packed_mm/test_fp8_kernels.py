"""The kernels around the fp8 GEMM, each against its definition, on the GPU or in Triton's interpreter.

The interpreter's dot wants fp32 operands.
"""

import pytest
import torch
import triton.language as tl
from _fp8_operands import (
    E4M3,
    E5M2,
    ENDS,
    ROWS,
    E,
    K,
    N,
    dense,
    each_direction,
    exact,
    in_float64,
    operands,
    packed,
    randn,
    rows_and_added,
)
from _grids import assert_same_bytes, generator, relative_error

from torchao_mx.ops.packed_mm import epilogue
from torchao_mx.ops.packed_mm.fp8 import kernels, weight
from torchao_mx.ops.packed_mm.fp8 import lowered as _fp8_lowered
from torchao_mx.reference import Added
from torchao_mx.reference import fp8 as definition

each_dtype = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


# --- rows of x ------------------------------------------------------------------------------------


def special_rows(columns):
    x = randn(40, columns) * torch.exp2(torch.arange(-20, 20).float())[:, None]
    x[0], x[1] = 0, -0.0
    x[2, 5], x[3, 7], x[4, 0], x[4, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    x[5], x[6] = x[5] * 2.0**-110, 2.0**-133
    x[7] = torch.finfo(torch.bfloat16).max
    x[8, 1:] = x[8, 1:] * 2.0**-20  # all but one round to zero or to subnormals
    return x


@each_dtype
@pytest.mark.parametrize("columns", [32, 80, 576, 4100])
def test_quantized_rows(kernel_device, columns, dtype):
    x = special_rows(columns)
    if kernel_device == "cuda":
        x = x.bfloat16()
    q, scale = (t.cpu() for t in kernels.quantize_rows(x.to(kernel_device), None, 1, 40, dtype))
    want_q, want_scale = definition.quantize_rows(x, dtype)
    assert torch.equal(scale.isnan(), want_scale.isnan())
    assert scale.isnan().nonzero().flatten().tolist() == [2, 3, 4]
    finite = ~scale.isnan()
    assert_same_bytes(q[finite], want_q[finite])
    assert_same_bytes(scale[finite], want_scale[finite])
    order = torch.randperm(120, generator=generator()).int()
    wide = torch.cat([x, x], 1).to(kernel_device)[:, :columns]
    gathered = kernels.quantize_rows(wide, order.to(kernel_device), 3, 120, dtype)
    assert torch.equal(gathered[0].cpu().view(torch.uint8), q.view(torch.uint8)[order.long() // 3])
    assert torch.equal(gathered[1].cpu().nan_to_num(), scale[order.long() // 3].nan_to_num())


@pytest.mark.parametrize("order", ["halves", "pairs"])
@pytest.mark.parametrize("columns", [32, 96, 128, 576])
def test_rows_in_the_order_of_a_fused_kernel(kernel_device, columns, order):
    """Where column c is, by what a thread of wgmma reads: 4 t .. 4 t + 3 of 16."""
    x = special_rows(columns)
    x = x.bfloat16() if kernel_device == "cuda" else x
    got, got_scale = (t.cpu() for t in kernels.permuted_rows(x.to(kernel_device), order))
    want, scale = kernels.quantize_rows(x.to(kernel_device), None, 1, 40, E4M3)
    assert_same_bytes(got_scale, scale.cpu())
    assert got.shape == (40, -(-columns // 128) * 128)
    if order == "halves":  # c = 8 t + 4 half + i
        place = [c // 32 * 32 + c // 4 % 2 * 16 + c // 8 % 4 * 4 + c % 4 for c in range(columns)]
    else:  # c = 8 j + 2 t + b
        place = [c // 16 * 16 + c // 2 % 4 * 4 + c // 8 % 2 * 2 + c % 2 for c in range(columns)]
    assert_same_bytes(got[:, place], want.cpu())
    assert got.view(torch.uint8)[got_scale.isfinite(), columns:].eq(0).all()


def test_definition_of_quantized_rows():
    x = special_rows(64)
    for dtype, bits in ((E4M3, 4), (E5M2, 3)):
        q, scale = definition.quantize_rows(x, dtype)
        largest = torch.finfo(dtype).max
        assert (scale[:2] == 2.0**-126).all() and (q[:2].float() == 0).all()
        ordinary = torch.tensor([7, *range(9, 40)])
        assert (q[ordinary].float().abs().amax(1) == largest).all()
        error = (q.float() * scale[:, None] - x)[ordinary].abs()
        bound = torch.maximum(x[ordinary].abs() * 2.0**-bits, scale[ordinary, None] * 2.0**-10)
        assert (error <= bound * (1 + 1e-5)).all()


# --- weights --------------------------------------------------------------------------------------


def corners(*shape, powers, transpose_weight):
    """As ``packed``; in the first matrix zeros, NaN and scales at both ends, one a line of shared scales.

    A line is a row, or without ``transpose_weight`` a column of blocks. The first three fit.
    """
    qdata, scale = packed(*shape, powers=powers)
    blocks = qdata.view(-1, *shape[-2:-1], shape[-1] // 32, 16)[0]
    byte = scale.view(torch.uint8).view(-1, *shape[-2:-1], shape[-1] // 32)[0]
    if not transpose_weight:
        blocks, byte = blocks.transpose(0, 1), byte.t()
    whole, first, rest = slice(None), slice(0, 1), slice(1, None)
    changes = (  # of a line: the blocks whose elements change, to what; those whose scales do
        (whole, 0, ((whole, 0),)),
        (rest, 0, ((rest, 1),)),
        (whole, 0x5A, ((whole, 78), (first, 64))),
        (first, 0, ((first, 255),)),  # NaN though its elements are zeros
        (first, 0x77, ((first, 255),)),
        (whole, 0x5A, ((whole, 63),)),
        (whole, 0x5A, ((slice(1, 2), 191),)),
    )
    for q, s, (where, code, scales) in zip(blocks, byte, changes, strict=False):
        q[where] = code
        for at, value in scales:
            s[at] = value
    return qdata, scale


@each_direction
@pytest.mark.parametrize("powers", [0, 14, 20])
@pytest.mark.parametrize("shape", [(48, 64), (3, 52, 96), (2, 132, 288)], ids=str)
def test_decoded_weight(kernel_device, shape, powers, transpose_weight):
    qdata, scale = corners(*shape, powers=powers, transpose_weight=transpose_weight)
    values, fits = exact(qdata, scale), definition.fits_fp8(qdata, scale, transpose_weight)
    decode = weight.fp8_rows if transpose_weight else weight.fp8_columns
    qdata, scale = qdata.to(kernel_device), scale.to(kernel_device)
    fp8, factor, flag = (t.cpu() for t in decode(qdata, scale))
    assert torch.equal(flag == 0, fits)
    if not transpose_weight:
        values, fits = values.mT, fits.repeat_interleave(32, -1)
    assert fits.any()
    assert torch.equal((fp8.float() * factor[..., None])[fits], values[fits])
    assert (fp8.float().isfinite()).all() and factor.isfinite().all()


@each_direction
@pytest.mark.parametrize("powers", [0, 11, 20])
@pytest.mark.parametrize("shape", [(48, 64), (3, 52, 96), (2, 132, 288)], ids=str)
def test_lowered_blocks(kernel_device, monkeypatch, shape, powers, transpose_weight):
    """What fits is the elements, from the table of e4m3's magnitudes lowered by the block, times the scale."""
    qdata, scale = corners(*shape, powers=powers, transpose_weight=transpose_weight)
    monkeypatch.setattr(definition, "MAX_SPREAD", 11)
    values, fits = exact(qdata, scale), definition.fits_fp8(qdata, scale, transpose_weight)
    operands = [t.to(kernel_device) for t in (qdata, scale)]
    *lead, n, blocks = scale.shape
    if transpose_weight:
        lowered, factor, flag = (t.cpu() for t in _fp8_lowered.lowered_rows(*operands))
        assert lowered.shape == (*lead, n, -(-blocks // 4) * 4)
        assert lowered[..., blocks:].eq(0).all()
        lowered = lowered[..., :blocks]
    else:
        lowered, factor, flag = (t.cpu() for t in _fp8_lowered.lowered_columns(*operands))
        assert lowered.shape == (*lead, blocks, -(-n // 128), 128)
        row = torch.arange(128)  # 32 step + 8 j + 2 t + b
        place = row // 2 % 4 * 32 + row // 32 * 8 + row // 8 % 4 * 2 + row % 2
        lowered = lowered[..., place].flatten(-2)
        assert lowered[..., n:].eq(0).all()
        lowered = lowered[..., :n].mT
    assert torch.equal(flag == 0, fits)
    table = torch.tensor([0, 0x60, 0x68, 0x6C, 0x70, 0x74, 0x78, 0x7C])
    codes = torch.stack([qdata & 15, qdata >> 4], -1).flatten(-2).long()
    magnitude = table[codes & 7] - lowered.long().repeat_interleave(32, -1)
    e4m3 = torch.where(codes & 7 != 0, magnitude, 0) | (codes & 8) << 4
    factor = factor[..., None] if transpose_weight else factor[..., None, :]
    fits = fits[..., None] if transpose_weight else fits.repeat_interleave(32, -1)[..., None, :]
    fits = fits.expand(values.shape)
    assert fits.any() if powers < 20 else shape == (48, 64) or not fits.all()
    assert e4m3[fits].ge(0).all()
    got = e4m3.to(torch.uint8).view(E4M3).float() * factor
    assert torch.equal(got[fits], values[fits])


@each_direction
def test_rule_of_what_fits(transpose_weight):
    corner = corners(1, 12 if transpose_weight else 96, 96 if transpose_weight else 384, powers=0,
                     transpose_weight=transpose_weight)  # fmt: skip
    fits = definition.fits_fp8(*corner, transpose_weight)
    assert fits.logical_not().nonzero()[:, 1].tolist() == [3, 4, 5, 6]
    assert definition.fits_fp8(*packed(1, 12, 96, powers=12), transpose_weight).all()
    assert not definition.fits_fp8(
        *packed(1, 64, 96 if transpose_weight else 64, powers=90), transpose_weight
    ).all()


@each_direction
def test_decoded_part_of_a_weight(kernel_device, transpose_weight):
    """A slice of result columns, its flags into a slice."""
    qdata, scale = (t.to(kernel_device) for t in packed(3, 64, 128, powers=20))
    flags = torch.full((3, 64 if transpose_weight else 4), 9, device=kernel_device)
    part = slice(16, 48) if transpose_weight else slice(1, 3)
    if transpose_weight:
        q, s, decode = qdata[:, part], scale[:, part], weight.fp8_rows
    else:
        q, s, decode = qdata[..., 16:48], scale[..., part], weight.fp8_columns
    flags = flags.to(torch.int8 if transpose_weight else torch.int32)
    got = decode(q, s, flags[:, part])
    want = decode(q.contiguous(), s.contiguous())
    for actual, wanted in zip(got, want, strict=True):
        assert torch.equal(actual.float(), wanted.float())
    assert (flags[:, : part.start] == 9).all() and (flags[:, part.stop :] == 9).all()


@pytest.mark.parametrize("transpose_weight", [True, False], ids=["wt", "w"])
def test_experts_without_rows_are_not_decoded(kernel_device, transpose_weight, poisoned):
    qdata, scale = (t.to(kernel_device) for t in packed(4, 64, 128, powers=20))
    offs = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=kernel_device)
    decode = weight.fp8_rows if transpose_weight else weight.fp8_columns
    whole, selected = decode(qdata, scale), decode(qdata, scale, offs=offs)
    for name, all_experts, some in zip(("fp8", "scale", "flag"), whole, selected, strict=True):
        a, b = (t.view(torch.uint8).cpu() for t in (all_experts, some))
        assert torch.equal(a[[1, 3]], b[[1, 3]]), name
    assert selected[2][[0, 2]].eq(0).all() and whole[2][0].ne(0).any()


# --- around the GEMM ------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "into_a_part"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
@pytest.mark.parametrize("terms", ["none", "lora", "bias", "both"])
def test_low_rank_term(kernel_device, in_place, grouped, terms):
    a = operands(True, rank={"lora": 1, "both": 80}.get(terms, 16))
    offs, h, up, bias = a["offs"], a["h"], a["up"], a["bias"]
    if not grouped:
        offs, up, bias = None, up[2:3], bias[2:3]
    h, up = (h, up) if terms in ("lora", "both") else (None, None)
    bias = bias if terms in ("bias", "both") else None
    part = randn(ROWS, N, seed=8)
    want, start = part.double(), 0
    for e, end in enumerate(ENDS if grouped else [ROWS]):
        if h is not None:
            want[start:end] += 0.5 * h[start:end].double() @ up[e].double().mT
        if bias is not None:
            want[start:end] += bias[e].double()
        start = end
    want[start:] = 0
    part[start:] = torch.nan  # as the GEMM may leave them
    there = [None if t is None else t.to(kernel_device) for t in (part, offs, h, up, bias)]
    part, offs, h, up, bias = there
    whole = torch.full((ROWS, 2 * N), 7.0, device=kernel_device)
    y = part if in_place else whole[:, N:]
    epilogue.finish(part, y, offs, Added(h, up, 0.5, bias), tl.float32)
    # A float32 dot runs in tf32 on the GPU.
    assert relative_error(y.cpu(), want) < (1e-6 if kernel_device == "cpu" else 1e-3)
    assert (y[start:] == 0).all() and (whole[:, :N] == 7).all()


@each_direction
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
def test_flagged_columns_are_recomputed_and_no_others(kernel_device, transpose_weight, grouped):
    a = operands(transpose_weight, powers=20, top_k=4)
    flags = torch.zeros(E, N if transpose_weight else K // 32, dtype=torch.int8)
    flags[0, 0] = flags[2, -1] = flags[3, -2] = flags[1, 1] = 1
    if not grouped:
        a, flags = dense(a), flags[2:3]
    want = in_float64(a, transpose_weight)
    per_column = flags.bool() if transpose_weight else flags.bool().repeat_interleave(32, -1)
    ends = torch.tensor(ENDS if grouped else [a["n_rows"]])
    owner = torch.searchsorted(ends, torch.arange(a["n_rows"]), right=True)
    mine = (owner < len(ends))[:, None] & per_column[owner.clamp(max=len(ends) - 1)]
    t = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in a.items()}
    if not grouped:
        t.update({k: t[k][None] for k in ("qdata", "scale", "up", "bias")})
    y = torch.full(want.shape, 7.0, device=kernel_device)
    rows, added = rows_and_added(t)
    kernels.recompute_flagged(
        y, t["x"], t["qdata"], t["scale"], flags.to(kernel_device), rows, transpose_weight, added,
        tl.float32,
    )  # fmt: skip
    y = y.cpu()
    assert mine.any() and (y[~mine] == 7).all()
    assert relative_error(y[mine], want[mine]) < (1e-6 if kernel_device == "cpu" else 1e-3)
