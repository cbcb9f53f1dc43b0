"""The Triton kernels against the reference, in the interpreter or on the GPU, into poisoned memory.

The interpreter truncates fp32 to bf16 and mishandles bf16 subnormals: there, grids are fp32, and bf16 is
seen only where every value is exact in it. On the GPU kernels see all dtypes and whole grids.
"""

import functools
import importlib

import pytest
import torch
from _grids import (
    DTYPES,
    FORMAT_MODES,
    FORMATS,
    GRIDS,
    MX_FORMATS,
    RCEIL,
    assert_same_bytes,
    assert_same_values,
    bf16_every_pattern,
    finite,
    fp32_every_exponent,
    fp32_near_thresholds,
    fp32_random_bits,
    from_bits,
    name_of,
    randn,
    special_blocks,
)

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, reference
from torchao_mx.ops.core.register import implementations

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
each_format_and_mode = pytest.mark.parametrize(("fmt", "mode"), FORMAT_MODES, ids=name_of)
each_axis = pytest.mark.parametrize("axis", [-1, -2])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # numpy's, on NaN, Inf and overflow, which kernels meet by design
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


def _module(name):
    # Not `import torchao_mx.ops.quantize`: the package binds the verb over the module's name.
    return importlib.import_module(f"torchao_mx.ops.quantization.{name}")


def quantize(x, fmt, mode=RCEIL, axis=-1, pts=None):
    return _module("quantize")._quantize_triton(x, fmt.name, mode.value, axis, pts)


def dequantize(qdata, scale, fmt, dtype, axis=-1, pts=None):
    entry = implementations[_module("dequantize").dequantize_op, "cuda"]
    return entry(qdata, scale, fmt.name, dtype, axis, pts)


def fake_quantize(x, fmt, mode=RCEIL, axis=-1, pts=None):
    return _module("fake_quantize")._fake_quantize_triton(x, fmt.name, mode.value, axis, pts)


def to(device, x):
    """``x`` on the device, with its strides and its storage offset."""
    if x is None or device == "cpu":
        return x
    elements = x.untyped_storage().nbytes() // x.element_size()
    flat = x.as_strided((elements,), (1,), 0).to(device)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def check(device, x, fmt, mode=RCEIL, axis=-1, pts=None):
    """All three kernels on ``x`` (given on the CPU) against the reference."""
    expected = reference.quantize(x, fmt, mode, axis, pts)
    x_there, pts_there = to(device, x), to(device, pts)
    results = quantize(x_there, fmt, mode, axis, pts_there)
    for actual, wanted in zip(results, expected, strict=True):
        assert_same_bytes(actual.cpu(), wanted)
    values = reference.dequantize(*expected, fmt, x.dtype, axis, pts)
    there = [to(device, t) for t in expected]
    assert_same_values(dequantize(*there, fmt, x.dtype, axis, pts_there).cpu(), values)
    assert_same_values(fake_quantize(x_there, fmt, mode, axis, pts_there).cpu(), values)


# Tensors as they may lie in memory, of whole tiles and ragged ones. r(*shape) is random and contiguous.
LAYOUTS = {
    "one_block": lambda r: r(32),
    "vector": lambda r: r(160),
    "row": lambda r: r(1, 96),
    "column": lambda r: r(64, 1),
    "ragged_rows": lambda r: r(37, 160),
    "ragged_columns": lambda r: r(96, 37),
    "matrix": lambda r: r(96, 160),
    "wide": lambda r: r(32, 288),
    "batch": lambda r: r(3, 64, 96),
    "rank_4": lambda r: r(2, 2, 32, 64),
    "rank_5": lambda r: r(2, 1, 2, 32, 32),
    "transposed": lambda r: r(160, 96).t(),
    "transposed_ragged": lambda r: r(96, 37).t(),
    "transposed_batch": lambda r: r(2, 64, 96).mT,
    "odd_row_stride": lambda r: r(64, 131)[:, 1:97],
    "odd_row_stride_transposed": lambda r: r(64, 131)[:, 1:97].t(),
    "even_row_stride": lambda r: r(64, 130)[:, 2:98],
    "odd_offset": lambda r: r(64, 128)[:, 33:97],
    "every_other_row": lambda r: r(128, 64)[::2],
    "every_other_column": lambda r: r(64, 128)[:, ::2],
    "permuted_batches": lambda r: r(2, 3, 32, 64).permute(1, 0, 2, 3),
    "heads": lambda r: r(2, 32, 3, 64).transpose(1, 2),
    "heads_transposed": lambda r: r(2, 32, 3, 64).permute(0, 2, 3, 1),
    "strides_all_large": lambda r: r(32, 2, 64, 3).permute(3, 1, 0, 2),
    "repeated_batch": lambda r: r(1, 32, 64).expand(3, -1, -1),
    "repeated_row": lambda r: r(1, 64).expand(32, -1),
    "repeated_column": lambda r: r(64, 1).expand(-1, 32),
}


# Each layout with the axes that whole blocks divide.
SHAPES = {name: layout(torch.empty).shape for name, layout in LAYOUTS.items()}
LAYOUT_AXES = [
    (name, axis)
    for name, shape in SHAPES.items()
    for axis in (-1, -2)[: len(shape)]
    if shape[axis] % 32 == 0
]
each_layout = pytest.mark.parametrize(("layout", "axis"), LAYOUT_AXES)


@each_layout
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8_E4M3, NVFP4], ids=name_of)
def test_layouts(kernel_device, layout, axis, fmt):
    for dtype in DTYPES if kernel_device == "cuda" else (torch.float32,):
        x = LAYOUTS[layout](functools.partial(randn, dtype=dtype))
        check(kernel_device, x, fmt, axis=axis)


@each_layout
def test_results_lie_as_the_fake_kernels_say(kernel_device, layout, axis):
    """torch.compile trusts the fake kernels' strides."""
    x = to(kernel_device, LAYOUTS[layout](randn))
    for name in ("quantize", "fake_quantize"):
        args = (MXFP4.name, RCEIL.value, axis, None)
        meta = x.to("meta").as_strided(x.shape, x.stride(), x.storage_offset())
        fake = getattr(_module(name), f"_{name}_fake")(meta, *args)
        real = getattr(_module(name), f"_{name}_triton")(x, *args)
        for r, f in zip(
            *((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True
        ):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), name


@each_dtype
@each_axis
@each_format
def test_dtypes(kernel_device, dtype, axis, fmt):
    """Exact in bf16: few mantissa bits, magnitudes near one."""
    check(kernel_device, randn(64, 96, dtype=dtype), fmt, axis=axis)


@pytest.mark.parametrize("out", DTYPES, ids=name_of)
@each_axis
@each_format
def test_dequantize_into(kernel_device, out, axis, fmt):
    qdata, scale = reference.quantize(randn(64, 96, dtype=torch.bfloat16), fmt, RCEIL, axis)
    expected = reference.dequantize(qdata, scale, fmt, out, axis)
    actual = dequantize(to(kernel_device, qdata), to(kernel_device, scale), fmt, out, axis)
    assert actual.is_contiguous()
    assert_same_values(actual.cpu(), expected)


@each_format
def test_dequantize_of_views(kernel_device, fmt):
    """Slices of experts and of rows, as MXTensor hands them over."""
    qdata, scale = reference.quantize(randn(4, 48, 64), fmt)
    views = (
        lambda t: t[1:3],
        lambda t: t[:, 7:40],
        lambda t: t[::2],
        lambda t: t[:, :, t.shape[2] // 2 :],
    )
    for view in views:
        q, s = view(qdata), view(scale)
        for axis in (-1, -2):
            expected = reference.dequantize(q, s, fmt, torch.float32, axis)
            actual = dequantize(
                to(kernel_device, q), to(kernel_device, s), fmt, torch.float32, axis
            )
            assert_same_values(actual.cpu(), expected)


@each_axis
@pytest.mark.parametrize("per_expert", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("layout", ["batch", "transposed_batch", "odd_rows"])
def test_per_tensor_scales(kernel_device, layout, per_expert, axis):
    def r(*shape):  # experts far apart in magnitude
        return randn(*shape) * torch.exp2(torch.arange(shape[0]) * 5.0)[:, None, None]

    x = LAYOUTS.get(layout, lambda r: r(3, 80, 131)[:, 1:65, 31:95])(r)
    pts = reference.per_tensor_scale(x, NVFP4, per_expert)
    check(kernel_device, x, NVFP4, axis=axis, pts=pts)


def check_values(device, x, fmt, mode, axis):
    x = x if axis == -1 else x.t().contiguous()
    check(device, x, fmt, mode, axis)
    if fmt.has_per_tensor_scale:
        check(device, x, fmt, mode, axis, reference.per_tensor_scale(finite(x), fmt))


# Fewer values than in GRIDS, in fp32; among them every magnitude of a bf16, with alternating signs.
EXPONENTS = (-126, -125, -64, -2, -1, 0, 1, 8, 63, 127)
INTERPRETED = {
    "every_magnitude": lambda: bf16_every_pattern()[:1024].float() * torch.tensor([1, -1] * 16),
    "random_bits": lambda: fp32_random_bits(rows=128),
    "thresholds": lambda: fp32_near_thresholds(EXPONENTS),
    "every_exponent": lambda: fp32_every_exponent()[::32],
    "special": special_blocks,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("grid", INTERPRETED)
@each_format_and_mode
def test_values_interpreted(grid, fmt, mode):
    check_values("cpu", INTERPRETED[grid](), fmt, mode, axis=-1)
    if mode == RCEIL:  # the axes differ in how they address, not in arithmetic
        check_values("cpu", INTERPRETED[grid](), fmt, mode, axis=-2)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", {**GRIDS, **INTERPRETED})
@each_axis
@each_format_and_mode
def test_values_compiled(grid, axis, fmt, mode):
    check_values("cuda", {**GRIDS, **INTERPRETED}[grid](), fmt, mode, axis)


@pytest.mark.gpu
@each_axis
@each_format_and_mode
def test_every_fp16_pattern(axis, fmt, mode):
    x = from_bits(torch.arange(1 << 16), torch.float16).view(-1, 32)
    check_values("cuda", x, fmt, mode, axis)


@each_format
def test_every_code_under_every_scale(kernel_device, fmt):
    """The whole domain of dequantize, into each dtype that the device rounds to."""
    qdata = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    per_row = 256 * fmt.elems_per_byte // fmt.block_size
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, per_row)
    qdata, scale = qdata.view(fmt.qdata_dtype), scale.view(fmt.scale_dtype)
    for dtype in DTYPES if kernel_device == "cuda" else (torch.float32, torch.float16):
        for axis in (-1, -2):
            expected = reference.dequantize(qdata, scale, fmt, dtype, axis)
            there = to(kernel_device, qdata), to(kernel_device, scale)
            assert_same_values(dequantize(*there, fmt, dtype, axis).cpu(), expected)


@each_axis
@each_format
def test_no_elements(kernel_device, axis, fmt):
    """The verbs refuse empty tensors; the ops under them, which compiled graphs may call, do not fail."""
    x = torch.empty(0, 32, 64, device=kernel_device)
    qdata, scale = quantize(x, fmt, axis=axis)
    expected = reference.quantize(x.cpu(), fmt, RCEIL, axis)
    assert (qdata.shape, scale.shape) == tuple(t.shape for t in expected)
    assert dequantize(qdata, scale, fmt, torch.float32, axis).shape == x.shape
    assert fake_quantize(x, fmt, axis=axis).shape == x.shape


@each_layout
def test_operands_are_left_alone(kernel_device, layout, axis):
    x = to(kernel_device, LAYOUTS[layout](randn))
    before = x.clone()
    quantize(x, MXFP4, axis=axis)
    fake_quantize(x, MXFP4, axis=axis)
    assert_same_bytes(x, before)


@pytest.mark.gpu
@each_axis
@pytest.mark.parametrize("fmt", MX_FORMATS[:2], ids=name_of)
def test_past_2_31_elements(fmt, axis):
    """Offsets are 64-bit: the last rows and columns are right."""
    rows, columns = 2**16 + 32, 2**15 + 64
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    corner = randn(64, 64, dtype=torch.bfloat16)
    x[-64:, -64:] = corner.cuda()
    expected = reference.quantize(corner, fmt, RCEIL, axis)
    qdata, scale = quantize(x, fmt, RCEIL, axis)
    for actual, wanted in zip((qdata, scale), expected, strict=True):
        assert_same_bytes(actual[-64:, -wanted.shape[1] :].cpu(), wanted)
    values = reference.dequantize(*expected, fmt, x.dtype, axis)
    assert_same_values(dequantize(qdata, scale, fmt, x.dtype, axis)[-64:, -64:].cpu(), values)
    del qdata, scale
    assert_same_values(fake_quantize(x, fmt, RCEIL, axis)[-64:, -64:].cpu(), values)


@pytest.mark.gpu
@each_axis
def test_more_batches_than_a_grid_axis_holds(axis):
    """CUDA's grids end at 65535 in the second axis."""
    x = randn(65_537, 32, 32, dtype=torch.bfloat16)
    check("cuda", x, MXFP4, axis=axis)
    check("cuda", x.mT, MXFP4, axis=axis)


@pytest.mark.gpu
def test_device_need_not_be_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for fmt in (MXFP4, MXFP8_E4M3):
        check("cuda:1", randn(64, 96, dtype=torch.bfloat16), fmt)
