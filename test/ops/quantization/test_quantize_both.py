"""quantize_both: the reference against torchao and ops.quantize, the kernel against the reference.

Bytes by equality. Where there is no GPU the kernel runs in Triton's interpreter, on fp32 grids (see
``test_kernels.py`` for why), into poisoned memory.
"""

import functools
import itertools

import pytest
import torch
import torchao
from _grids import (
    DTYPES,
    FORMAT_MODES,
    GRIDS,
    as_bytes,
    assert_same_bytes,
    assert_same_values,
    finite,
    fp32_every_exponent,
    fp32_near_thresholds,
    generator,
    name_of,
    randn,
    refusals,
    special_blocks,
)
from _quantize_both import FORMS, MODULE, check, poisoned, quiet, to
from expecttest import assert_expected_inline
from torch.library import opcheck
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

from torchao_mx import MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4, QuantizeSpec, ops, reference

AT_LEAST_0_18 = tuple(int(n) for n in torchao.__version__.split(".")[:2]) >= (0, 18)
NVFP4_SPEC, MXFP8_SPEC = QuantizeSpec(NVFP4), QuantizeSpec(MXFP8_E4M3)
PAIRS = [
    (NVFP4_SPEC, MXFP8_SPEC),
    (MXFP8_SPEC, MXFP8_SPEC),
    (QuantizeSpec(MXFP8_E5M2), QuantizeSpec(MXFP4)),
    (QuantizeSpec(MXFP4), NVFP4_SPEC),
]
each_pair = pytest.mark.parametrize(("row", "column"), PAIRS, ids=str)
each_format_and_mode = pytest.mark.parametrize(("fmt", "mode"), FORMAT_MODES, ids=name_of)


def scale_of(x, spec):
    return reference.per_tensor_scale(finite(x), spec.format) if spec.format is NVFP4 else None


def whole_rows(x, fmt):
    """x with rows of zeros up to whole blocks."""
    return torch.cat([x, x.new_zeros(-len(x) % fmt.block_size, x.shape[1])])


# --- what it is -----------------------------------------------------------------------------------


@each_pair
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_is_quantize_along_each_axis(row, column, rows, dtype, device):
    x = randn(rows, 96, dtype=dtype).to(device)
    scales = {"row_scale": scale_of(x, row), "column_scale": scale_of(x, column)}
    both = ops.quantize_both(x, row, column, FORMS, dtype=torch.float32, **scales)
    for axis, spec, pts, packed, values in (
        (-1, row, scales["row_scale"], both.rows, both.row_values),
        (-2, column, scales["column_scale"], both.columns, both.column_values),
    ):
        operand = x if axis == -1 else whole_rows(x, spec.format)
        expected = ops.quantize(
            operand, spec.format, spec.scaling_mode, axis=axis, per_tensor_scale=pts
        )
        for actual, wanted in zip(packed, expected, strict=True):
            assert_same_bytes(actual, wanted)
        decoded = ops.dequantize(
            *expected, spec.format, torch.float32, axis=axis, per_tensor_scale=pts
        )
        assert values.is_contiguous()
        assert_same_values(values, decoded[:rows].contiguous())


@pytest.mark.parametrize("grid", ["special_blocks", "fp32_near_thresholds", "bf16_shuffled"])
@each_format_and_mode
def test_is_torchaos(grid, fmt, mode):
    """Scales of every block, and elements of those without a NaN (whose elements torchao does not define)."""
    x = GRIDS[grid]()[:2047]
    x = x[torch.randperm(len(x), generator=generator())]  # so that columns hold something to scale
    if fmt is NVFP4:
        x = finite(x)
    spec = QuantizeSpec(fmt, mode)
    pts = scale_of(x, spec)
    both = ops.quantize_both(x, spec, spec, row_scale=pts, column_scale=pts)
    turned = whole_rows(x, fmt).t().contiguous()
    for packed, operand in ((both.rows, x.contiguous()), (both.columns, turned)):
        if fmt is NVFP4:
            scale, qdata = nvfp4_quantize(operand, fmt.block_size, pts)
        else:
            scale, qdata = to_mx(operand, fmt.elem_dtype, fmt.block_size, mode)
        actual_qdata, actual_scale = (as_bytes(t) for t in packed)
        assert torch.equal(actual_scale, scale.view(torch.uint8).view(actual_scale.shape))
        if fmt is not NVFP4 or AT_LEAST_0_18:
            kept = ~operand.unflatten(-1, (-1, fmt.block_size)).isnan().any(-1)
            blocks = [
                t.reshape(*kept.shape, -1)[kept]
                for t in (actual_qdata, qdata.view(torch.uint8).view(actual_qdata.shape))
            ]
            assert torch.equal(*blocks)


def test_forms_are_those_asked_for():
    x = randn(40, 64)
    everything = ops.quantize_both(x, MXFP8_SPEC, MXFP8_SPEC, FORMS)
    for count in range(1, len(FORMS) + 1):
        for forms in itertools.combinations(FORMS, count):
            both = ops.quantize_both(x, MXFP8_SPEC, MXFP8_SPEC, forms)
            assert {name for name in FORMS if getattr(both, name) is not None} == {*forms}
            for name in forms:
                got, want = getattr(both, name), getattr(everything, name)
                pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
                for actual, wanted in pairs:
                    assert_same_bytes(actual, wanted)
    rows = ops.quantize_both(x, MXFP8_SPEC, None)
    assert rows.rows is not None and rows.columns is rows.column_values is None
    odd = ops.quantize_both(randn(40, 50), None, MXFP8_SPEC)  # K needs no blocks then
    assert [t.shape for t in odd.columns] == [(50, 64), (50, 2)]


@each_pair
def test_columns_of_gathered_rows(row, column, device):
    """As of the gathered matrix; row forms are x's."""
    x = randn(50, 64).to(device)
    index = torch.randperm(50, generator=generator())[:37]
    index = torch.cat([index[:7], torch.full((25,), -1), index[7:]]).int().to(device)
    scales = {"row_scale": scale_of(x, row), "column_scale": scale_of(x, column)}
    both = ops.quantize_both(x, row, column, FORMS, index=index, **scales)
    gathered = torch.where((index >= 0)[:, None], x[index.clamp(min=0)], 0)
    expected = ops.quantize_both(gathered, row, column, FORMS, **scales)
    for actual, wanted in zip(both.columns, expected.columns, strict=True):
        assert_same_bytes(actual, wanted)
    assert_same_values(both.column_values, expected.column_values)
    named = index[index >= 0].long()
    plain = ops.quantize_both(x, row, column, FORMS, **scales)
    for actual, wanted in zip(both.rows, plain.rows, strict=True):
        assert actual.shape == wanted.shape
        assert_same_bytes(as_bytes(actual)[named], as_bytes(wanted)[named])
    assert_same_values(both.row_values[named], plain.row_values[named])


# --- the kernel -----------------------------------------------------------------------------------


LAYOUTS = {
    "one_block": lambda r: r(1, 32),
    "tiles": lambda r: r(256, 128),  # whole ones, however they are cut
    "ragged": lambda r: r(150, 160),
    "short": lambda r: r(31, 96),
    "row_stride": lambda r: r(40, 131)[:, 1:97],
    "every_other_row": lambda r: r(130, 64)[::2],
    "transposed": lambda r: r(96, 70).t(),
    "every_other_column": lambda r: r(40, 128)[:, ::2],
    "repeated_row": lambda r: r(1, 64).expand(33, -1),
    "repeated_column": lambda r: r(33, 1).expand(-1, 64),
    "scalar": lambda r: r(1, 1).expand(33, 64),
}


@poisoned
@quiet
@pytest.mark.parametrize("layout", LAYOUTS)
@each_pair
def test_layouts(kernel_device, layout, row, column):
    for dtype in DTYPES if kernel_device == "cuda" else (torch.float32,):
        x = LAYOUTS[layout](functools.partial(randn, dtype=dtype))
        pts = (scale_of(x, row), scale_of(x, column))
        check(kernel_device, x, row, column, dtype=dtype, pts=pts)


@poisoned
@quiet
@pytest.mark.parametrize("rows", [384, 300])
def test_a_grid_of_fewer_rows_than_there_are_tiles(kernel_device, monkeypatch, rows):
    monkeypatch.setattr(MODULE, "GRID_M", 2)
    x = randn(rows, 64)
    pts = (scale_of(x, NVFP4_SPEC), None)
    check(kernel_device, x, NVFP4_SPEC, MXFP8_SPEC, ("rows", "columns"), pts=pts)


@poisoned
@quiet
@pytest.mark.parametrize(
    "forms", [f for n in range(1, 5) for f in itertools.combinations(FORMS, n)], ids="+".join
)
def test_each_choice_of_forms(kernel_device, forms):
    x = randn(40, 96)
    check(kernel_device, x, NVFP4_SPEC, MXFP8_SPEC, forms, pts=(scale_of(x, NVFP4_SPEC), None))
    if not any(form.startswith("row") for form in forms):
        check(kernel_device, randn(40, 50), None, MXFP8_SPEC, forms)


INTERPRETED = {
    "special": special_blocks,
    "thresholds": lambda: fp32_near_thresholds((-126, -2, 0, 1, 127)),
    "every_exponent": lambda: fp32_every_exponent()[::64],
}


def check_grid(device, x, fmt, mode):
    """In blocks along K of the rows, and along M of the same blocks turned."""
    spec = QuantizeSpec(fmt, mode)
    pts = (scale_of(x, spec),) * 2
    check(device, x, spec, spec, dtype=x.dtype, pts=pts)
    check(device, x.t(), None, spec, ("columns", "column_values"), x.dtype, pts=pts)


@poisoned
@quiet
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("grid", INTERPRETED)
@each_format_and_mode
def test_values_interpreted(grid, fmt, mode):
    check_grid("cpu", INTERPRETED[grid](), fmt, mode)


@poisoned
@pytest.mark.gpu
@pytest.mark.parametrize("grid", {**GRIDS, **INTERPRETED})
@each_format_and_mode
def test_values_compiled(grid, fmt, mode):
    check_grid("cuda", {**GRIDS, **INTERPRETED}[grid](), fmt, mode)


@poisoned
@quiet
@each_pair
def test_gathering_kernel(kernel_device, row, column):
    x = randn(50, 96)
    index = torch.randperm(50, generator=generator()).int()
    index = torch.cat([index[:9], torch.full((23,), -1), index[9:], torch.full((5,), -1)]).int()
    pts = (scale_of(x, row), scale_of(x, column))
    check(kernel_device, x, row, column, index=index, pts=pts)
    tokens = torch.tensor([3, 3, 0, -1, 49, 3], dtype=torch.int32)  # of a token several rows
    check(kernel_device, x, None, column, FORMS[2:], index=tokens, pts=pts)
    if column.format.elem_bits == row.format.elem_bits == 8:
        check(kernel_device, x, row, column, index=index, seed=torch.tensor(11))


@poisoned
def test_no_rows(kernel_device):
    """The verb refuses them; the op under it, which layers call, does not."""
    for index in (None, torch.empty(0, dtype=torch.int32)):
        check(kernel_device, torch.empty(0, 64), NVFP4_SPEC, MXFP8_SPEC, index=index)


@pytest.mark.gpu
def test_past_2_31_elements():
    """Offsets are 64-bit: the last rows and columns are right."""
    x = torch.zeros(2**16 + 32, 2**15 + 64, dtype=torch.bfloat16, device="cuda")
    corner = randn(64, 64, dtype=torch.bfloat16)
    x[-64:, -64:] = corner.cuda()
    want = reference.quantize_both(corner, MXFP8_SPEC, MXFP8_SPEC)
    got = ops.quantize_both(x, MXFP8_SPEC, MXFP8_SPEC)
    for name in ("rows", "columns"):
        for actual, wanted in zip(getattr(got, name), getattr(want, name), strict=True):
            assert_same_bytes(actual[-64:, -wanted.shape[1] :].cpu(), wanted)
    del got
    forms = ("row_values", "column_values")
    for name in forms:
        actual = getattr(ops.quantize_both(x, MXFP8_SPEC, MXFP8_SPEC, (name,)), name)
        assert_same_values(actual[-64:, -64:].cpu(), getattr(want, name))


# --- the op ---------------------------------------------------------------------------------------


def op_args(seed=None, index=None):
    return (randn(40, 96), "mxfp8_e4m3", "rceil", "mxfp8_e5m2", "floor", list(FORMS), torch.bfloat16, None,
            None, seed, index)  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        op_args(),
        op_args(torch.tensor(3)),
        op_args(index=torch.tensor([1, -1, 3], dtype=torch.int32)),
    ],
    ids=["plain", "seed", "index"],
)
def test_opcheck(args, device):
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    utils = ["test_autograd_registration", "test_faketensor"]
    opcheck(torch.ops.torchao_mx.quantize_both.default, args, test_utils=utils)


def test_results_lie_as_the_fake_kernel_says(kernel_device):
    for layout in LAYOUTS.values():
        x = to(kernel_device, layout(randn))
        args = ("mxfp4", "rceil", "mxfp8_e4m3", "rceil", list(FORMS), torch.float32, *[None] * 4)
        meta = x.to("meta").as_strided(x.shape, x.stride(), x.storage_offset())
        real, fake = MODULE._quantize_both_triton(x, *args), MODULE._quantize_both_fake(meta, *args)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_is_not_differentiable():
    x = randn(32, 64).requires_grad_()
    both = ops.quantize_both(x, MXFP8_SPEC, MXFP8_SPEC, FORMS)
    assert not both.row_values.requires_grad and not both.columns[0].requires_grad


def test_refusals():
    x, seed, index = torch.ones(40, 64), torch.tensor(1), torch.zeros(4, dtype=torch.int32)
    q, mxfp8 = ops.quantize_both, MXFP8_SPEC
    assert_expected_inline(
        refusals(
            [
                lambda: q(x.double(), mxfp8, mxfp8),
                lambda: q(x[0], mxfp8, mxfp8),
                lambda: q(x[:, :40], mxfp8, mxfp8),
                lambda: q(x[:0], None, mxfp8),
                lambda: q(x, MXFP8_E4M3, mxfp8),
                lambda: q(x, mxfp8, mxfp8, ("values",)),
                lambda: q(x, mxfp8, mxfp8, ()),
                lambda: q(x, None, None),
                lambda: q(x, None, mxfp8, ("row_values",)),
                lambda: q(x, mxfp8, mxfp8, dtype=torch.float64),
                lambda: q(x, mxfp8, mxfp8, row_scale=torch.ones(())),
                lambda: q(x, NVFP4_SPEC, mxfp8, row_scale=torch.ones(1)),
                lambda: q(x, NVFP4_SPEC, mxfp8, seed=seed),
                lambda: q(x, mxfp8, mxfp8, seed=seed.int()),
                lambda: q(x, mxfp8, mxfp8, index=index.long()),
                lambda: q(x, mxfp8, mxfp8, index=index.to("meta")),
            ]
        ),
        """\
TypeError: x has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: x has shape (64,); it must be [M, K]: use x.flatten(0, -2)
ValueError: x has shape (40, 40); its axis -1 (40) is not a multiple of 32, the block size of mxfp8_e4m3: pad it, or leave this layer out with filter_fn
ValueError: x has shape (0, 64); block formats need dimensions above zero: skip empty tensors before quantizing
TypeError: BlockFormat(name='mxfp8_e4m3', elem_dtype=torch.float8_e4m3fn, exponent_bits=4, mantissa_bits=3, elem_max=448.0, block_size=32, scale_dtype=torch.float8_e8m0fnu, has_per_tensor_scale=False) is not a QuantizeSpec; use torchao_mx.QuantizeSpec(format)
ValueError: forms=('values',); give one or more of rows, row_values, columns, column_values
ValueError: forms=(); give one or more of rows, row_values, columns, column_values
ValueError: forms=(); give one or more of rows, row_values, columns, column_values
ValueError: forms=('row_values',) with row=None; give row a QuantizeSpec
TypeError: the output has dtype torch.float64; block formats are quantized from and dequantized to bfloat16, float16 or float32: convert it with .to(torch.bfloat16) first
ValueError: mxfp8_e4m3 has no per-tensor scale; leave per_tensor_scale out
ValueError: per_tensor_scale has shape (1,); it must be 0-d, or [E, 1, 1] for x [E, M, K]: x has shape (40, 64)
ValueError: got a seed with nvfp4; stochastic rounding needs 8-bit elements: leave the seed out, or use an MXFP8 format
ValueError: seed is a 0-d torch.int32 tensor on cpu; it must be 0-d, torch.int64 and on x's device, cpu
ValueError: index is a 1-d torch.int64 tensor on cpu; it must be 1-d, torch.int32 and on x's device, cpu
ValueError: index is a 1-d torch.int32 tensor on meta; it must be 1-d, torch.int32 and on x's device, cpu""",
    )
