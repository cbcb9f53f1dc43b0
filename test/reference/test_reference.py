"""The reference quantizer against torchao's, byte for byte.

torchao 0.18's NVFP4 quantizer multiplies by a reciprocal where 0.17's divides, so elements differ by a
rounding between the two releases; scales do not. We follow 0.18 and compare elements only with it.
"""

import pytest
import torch
import torchao
from _grids import (
    DTYPES,
    FORMAT_MODES,
    FORMATS,
    GRIDS,
    MODES,
    MX_FORMATS,
    RCEIL,
    as_bytes,
    assert_same_bytes,
    assert_same_values,
    finite,
    from_bits,
    generator,
    name_of,
    randn,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import (
    NVFP4Tensor,
    nvfp4_quantize,
    per_tensor_amax_to_scale,
)

from torchao_mx import MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4, ScaleCalculationMode, ops, reference

AT_LEAST_0_18 = tuple(int(n) for n in torchao.__version__.split(".")[:2]) >= (0, 18)

each_mx_format = pytest.mark.parametrize("fmt", MX_FORMATS, ids=name_of)
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=name_of)
each_mode = pytest.mark.parametrize("mode", MODES, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
each_format_and_mode = pytest.mark.parametrize(("fmt", "mode"), FORMAT_MODES, ids=name_of)
each_grid = pytest.mark.parametrize("grid", GRIDS)


def codes(qdata, fmt):
    """``[..., n]`` elements as integers, one a byte."""
    byte = qdata.view(torch.uint8)
    return torch.stack([byte & 15, byte >> 4], -1).flatten(-2) if fmt.elem_bits == 4 else byte


def assert_same_blocks(qdata, scale, torchao_qdata, torchao_scale, x, fmt, elements=True):
    """Equal scales and elements; a block with a NaN has the NaN scale and our element throughout."""
    nan_byte = 0xFF if fmt in MX_FORMATS else 0x7F
    holds_nan = x.unflatten(-1, (-1, fmt.block_size)).isnan().any(-1)
    byte = scale.view(torch.uint8)
    assert (byte[holds_nan] == nan_byte).all()
    theirs = torchao_scale.view(torch.uint8).view(byte.shape)
    if fmt in MX_FORMATS:
        assert torch.equal(byte, theirs)
    else:  # x86 gives some of torchao's NaN scales a sign
        assert torch.equal(byte == nan_byte, theirs & 0x7F == nan_byte)
        assert torch.equal(byte[byte != nan_byte], theirs[byte != nan_byte])
    blocks = codes(qdata, fmt).unflatten(-1, (-1, fmt.block_size))
    assert (blocks[holds_nan] == fmt.nan_code).all()
    if elements:
        kept = byte != nan_byte
        theirs = codes(torchao_qdata.view(qdata.shape), fmt).unflatten(-1, (-1, fmt.block_size))
        assert torch.equal(blocks[kept], theirs[kept])


@each_grid
@each_mx_format
@each_mode
def test_mx_is_torchaos(grid, fmt, mode):
    x = GRIDS[grid]()
    torchao_scale, torchao_qdata = to_mx(x, fmt.elem_dtype, fmt.block_size, mode)
    qdata, scale = reference.quantize(x, fmt, mode)
    assert (qdata.dtype, scale.dtype) == (fmt.qdata_dtype, fmt.scale_dtype)
    assert_same_blocks(qdata, scale, torchao_qdata, torchao_scale, x, fmt)


@each_grid
@pytest.mark.parametrize("per_tensor", [False, True], ids=["block_scales", "per_tensor_scale"])
def test_nvfp4_is_torchaos(grid, per_tensor):
    x = GRIDS[grid]()
    pts = reference.per_tensor_scale(finite(x), NVFP4) if per_tensor else None
    torchao_scale, torchao_qdata = nvfp4_quantize(x, NVFP4.block_size, pts)
    qdata, scale = reference.quantize(x, NVFP4, per_tensor_scale=pts)
    assert_same_blocks(qdata, scale, torchao_qdata, torchao_scale, x, NVFP4, AT_LEAST_0_18)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nvfp4_of_experts_is_torchaos(magnitude, dtype):
    x = (randn(5, 48, 64) * magnitude).to(dtype)
    x[1] *= 1024
    pts = reference.per_tensor_scale(x, NVFP4, per_expert=True)
    assert_same_bytes(pts, per_tensor_amax_to_scale(x.abs().amax((-2, -1), keepdim=True)))
    qdata, scale = reference.quantize(x, NVFP4, per_tensor_scale=pts)
    # 0.17 knows no scale per expert: expert by expert is the same there.
    results = [nvfp4_quantize(x[e], NVFP4.block_size, pts[e, 0, 0]) for e in range(len(x))]
    torchao_scale, torchao_qdata = (torch.stack(t) for t in zip(*results, strict=True))
    assert_same_blocks(qdata, scale, torchao_qdata, torchao_scale, x, NVFP4, AT_LEAST_0_18)
    if AT_LEAST_0_18:
        at_once = nvfp4_quantize(x, NVFP4.block_size, pts)
        assert_same_blocks(qdata, scale, at_once[1], at_once[0], x, NVFP4)


@each_dtype
def test_per_tensor_scale_is_torchaos(dtype):
    x = randn(48, 64, dtype=dtype)
    scale = reference.per_tensor_scale(x, NVFP4)
    assert scale.shape == ()
    assert_same_bytes(scale, per_tensor_amax_to_scale(x.abs().max()))


def test_per_tensor_scale_of_zeros_keeps_them_zero():
    """Where torchao divides zero by zero; a tensor of subnormals is kept finite too."""
    x = torch.zeros(2, 16, 32)
    x[1, 3, 5] = 448 * 6
    assert reference.per_tensor_scale(x, NVFP4, per_expert=True).flatten().tolist() == [
        2.0**-120,
        1,
    ]
    pts = reference.per_tensor_scale(x[0], NVFP4)
    assert reference.fake_quantize(x[0], NVFP4, per_tensor_scale=pts).eq(0).all()
    tiny = torch.full((1, 16), 1e-38)
    tiny[0, 1] = 0
    fake = reference.fake_quantize(
        tiny, NVFP4, per_tensor_scale=reference.per_tensor_scale(tiny, NVFP4)
    )
    assert fake.isfinite().all() and fake[0, 1] == 0


def every_code_and_scale(fmt):
    """qdata and scale [256, ...]: row b has every code under scale byte b."""
    qdata = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    per_row = 256 * fmt.elems_per_byte // fmt.block_size
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, per_row)
    return qdata.view(fmt.qdata_dtype), scale.view(fmt.scale_dtype)


@each_mx_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_every_mx_value_is_torchaos(fmt, dtype):
    qdata, scale = every_code_and_scale(fmt)
    expected = to_dtype(qdata, scale, fmt.elem_dtype, fmt.block_size, dtype)
    assert_same_values(reference.dequantize(qdata, scale, fmt, dtype), expected)


@pytest.mark.parametrize("pts", [None, 1.0, 3.7e-5, 2.0**-140, 1e36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_every_nvfp4_value_is_torchaos(pts, dtype):
    qdata, scale = every_code_and_scale(NVFP4)
    pts = None if pts is None else torch.tensor(pts)
    # A logical dtype of fp32 makes 0.17 multiply the two scales in fp32, as 0.18 always does.
    tensor = NVFP4Tensor(qdata, scale, NVFP4.block_size, torch.float32, per_tensor_scale=pts)
    expected = tensor.dequantize(torch.float32).to(dtype)
    actual = reference.dequantize(qdata, scale, NVFP4, dtype, per_tensor_scale=pts)
    assert_same_values(actual, expected)


def values_float64(qdata, scale, fmt):
    """The definition: element times scale, from tables of OCP's and torch's own."""
    if fmt.elem_bits == 4:
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        elements = torch.cat([table, -table])[codes(qdata, fmt).int()]
    else:
        elements = qdata.double()
    if fmt in MX_FORMATS:
        byte = scale.view(torch.uint8).double()
        scales = torch.where(byte == 255, torch.nan, torch.exp2(byte - 127))
    else:
        scales = scale.double()
    return elements * scales.repeat_interleave(fmt.block_size, -1)


@each_format
@each_dtype
def test_every_value_is_its_definition_rounded_once(fmt, dtype):
    qdata, scale = every_code_and_scale(fmt)
    expected = values_float64(qdata, scale, fmt).to(dtype)
    assert_same_values(reference.dequantize(qdata, scale, fmt, dtype), expected)


@each_format_and_mode
def test_quantizes_to_the_nearest_element(fmt, mode):
    """Against float64: no other element of the format, under this scale, is nearer."""
    x = randn(256, 64)
    qdata, scale = reference.quantize(x, fmt, mode)
    value = values_float64(qdata, scale, fmt)
    table_q, table_s = every_code_and_scale(fmt)
    one = 127 if fmt in MX_FORMATS else 0x38
    table = values_float64(table_q[one : one + 1], table_s[one : one + 1], fmt).flatten()
    table = table[table.isfinite()].unique()
    scale_of_x = value.new_tensor(scale.float().numpy()).repeat_interleave(fmt.block_size, -1)
    scaled = x.double() / scale_of_x
    nearest = (scaled[..., None] - table).abs().amin(-1)
    assert torch.equal((scaled - value / scale_of_x).abs(), nearest)


@each_mx_format
@each_mode
def test_modes_order_the_scales(fmt, mode):
    """RCEIL and CEIL never saturate; FLOOR and EVEN use the whole range and may."""
    x = randn(512, 32).abs()
    scale = reference.quantize(x, fmt, mode)[1].float().squeeze(-1)
    amax = x.amax(-1)
    fits = amax <= fmt.elem_max * scale
    if mode in (ScaleCalculationMode.RCEIL, ScaleCalculationMode.CEIL):
        assert fits.all()
    else:
        assert not fits.all()
        assert (amax < 2.0 ** (fmt.max_exponent + 1) * scale).all()
    if mode == ScaleCalculationMode.RCEIL:
        assert (amax > fmt.elem_max * scale / 2).all()


def test_all_zero_blocks_stay_zero_with_their_signs():
    x = torch.zeros(4, 64)
    x[:, 1::2] = -0.0
    for fmt, mode in FORMAT_MODES:
        out = reference.fake_quantize(x, fmt, mode)
        assert_same_bytes(out, x)


def test_signs_survive_rounding_to_zero():
    x = torch.full((1, 32), -1e-12)
    x[0, 0] = 6.0
    for fmt, mode in FORMAT_MODES:
        out = reference.fake_quantize(x, fmt, mode)
        assert out[0, 1:].eq(0).all()
        assert out[0, 1:].signbit().all()


@each_mx_format
def test_giants_saturate_their_block(fmt):
    x = torch.zeros(2, 32)
    x[0, :2] = torch.tensor([float("inf"), 1.0])
    x[1, :2] = torch.tensor([-float("inf"), 3e38])
    for mode in MODES:
        _, scale = reference.quantize(x, fmt, mode)
        out = reference.fake_quantize(x, fmt, mode)
        if (scale.view(torch.uint8) != 0xFF).all():  # else NaN says it: FLOOR may reach 255
            assert out[0, 0] == -out[1, 0]
            assert out[0, 0] > 1e38
        else:
            assert out[scale.view(torch.uint8)[:, 0] == 0xFF].isnan().all()


@each_format
def test_nan_makes_its_block_nan_and_no_other(fmt):
    x = randn(4, 64)
    x[1, fmt.block_size + 3] = float("nan")
    out = reference.fake_quantize(x, fmt)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[1, fmt.block_size : 2 * fmt.block_size] = True
    assert torch.equal(out.isnan(), expected)
    assert_same_values(out[~expected], reference.fake_quantize(randn(4, 64), fmt)[~expected])


@each_format_and_mode
def test_axis_before_the_last_is_the_transpose(fmt, mode):
    x = randn(3, 96, 64)
    qdata, scale = reference.quantize(x, fmt, mode, axis=-2)
    expected = reference.quantize(x.mT.contiguous(), fmt, mode)
    assert_same_bytes(qdata, expected[0])
    assert_same_bytes(scale, expected[1])
    out = reference.dequantize(qdata, scale, fmt, torch.float32, axis=-2)
    assert out.is_contiguous()
    assert_same_values(out, reference.dequantize(*expected, fmt, torch.float32).mT)
    assert_same_values(reference.fake_quantize(x, fmt, mode, axis=-2), out)


@each_format
@each_dtype
def test_dtypes_agree_where_the_values_do(fmt, dtype):
    x = randn(64, 64, dtype=dtype).clamp(-1e4, 1e4)
    for actual, expected in zip(
        reference.quantize(x, fmt), reference.quantize(x.float(), fmt), strict=True
    ):
        assert_same_bytes(actual, expected)


def test_every_fp16_pattern_is_its_fp32_values():
    """torchao takes no fp16; every pattern is an fp32 value, which it does take."""
    x = from_bits(torch.arange(1 << 16), torch.float16).view(-1, 32)
    for fmt in MX_FORMATS:
        qdata, scale = reference.quantize(x, fmt, RCEIL)
        theirs = to_mx(x.float(), fmt.elem_dtype, fmt.block_size, RCEIL)
        assert_same_blocks(qdata, scale, theirs[1], theirs[0], x, fmt)


def test_strides_do_not_matter():
    x = randn(6, 32, 5, 64)
    views = [x.permute(2, 0, 1, 3), x[:, ::3, 1:4], x.mT[..., :32].mT, x[:1].expand(3, -1, -1, -1)]
    for fmt in FORMATS:
        for view in views:
            for actual, expected in zip(
                reference.quantize(view, fmt),
                reference.quantize(view.contiguous(), fmt),
                strict=True,
            ):
                assert_same_bytes(actual, expected)


@pytest.mark.parametrize(
    ("fmt", "elements", "packed"),
    [
        (MXFP4, [0.5, -1.0], [0x01 | 0xA0]),
        (MXFP4, [6.0, 3.0], [0x07 | 0x50]),
        (MXFP8_E4M3, [448.0, 1.0], [0x7E, 0x38]),
        (MXFP8_E5M2, [57344.0, 1.0], [0x7B, 0x3C]),
    ],
    ids=lambda v: v.name if hasattr(v, "name") else None,
)
def test_low_nibble_comes_first(fmt, elements, packed):
    x = torch.zeros(fmt.block_size)
    x[: len(elements)] = torch.tensor(elements)
    x[-1] = fmt.elem_max
    qdata, scale = reference.quantize(x, fmt)
    assert scale.float().tolist() == [1.0]
    assert as_bytes(qdata)[: len(packed)].tolist() == packed


@st.composite
def tensors(draw):
    """Any rank from 1, whole blocks along both axes, values of any bits, magnitude or dtype."""
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = [*lead, *(32 * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))]
    dtype = draw(st.sampled_from(DTYPES))
    g = generator(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        x = from_bits(torch.randint(-(2**31), 2**31, shape, generator=g), dtype)
    else:
        x = (torch.randn(shape, generator=g) * 2.0 ** draw(st.integers(-130, 120))).to(dtype)
    if draw(st.booleans()) and len(shape) > 1 and shape[-2] % 32 == 0:
        x = x.mT
    return x


@settings(max_examples=150)
@given(x=tensors(), fmt_mode=st.sampled_from(FORMAT_MODES), axis=st.sampled_from([-1, -2]))
def test_fake_quantize_is_dequantize_of_quantize(x, fmt_mode, axis):
    fmt, mode = fmt_mode
    if x.dim() == 1 or x.shape[axis] % fmt.block_size:
        axis = -1
    pts = ops.per_tensor_scale(finite(x), fmt) if fmt.has_per_tensor_scale else None
    packed = ops.quantize(x, fmt, mode, axis=axis, per_tensor_scale=pts)
    values = ops.dequantize(*packed, fmt, x.dtype, axis=axis, per_tensor_scale=pts)
    at_once = ops.fake_quantize(x, fmt, mode, axis=axis, per_tensor_scale=pts)
    assert_same_values(at_once, values)
    if axis == -1:
        *twin, twin_values = ops.quantize_with_values(x, fmt, mode, per_tensor_scale=pts)
        assert_same_values(twin_values, values)
        for actual, expected in zip(twin, packed, strict=True):
            assert_same_bytes(actual, expected)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    power=st.integers(-80, 80),
    fmt=st.sampled_from(MX_FORMATS),
    mode=st.sampled_from(MODES),
)
def test_powers_of_two_move_into_the_scale(seed, power, fmt, mode):
    x = randn(4, 64, seed=seed)
    qdata, scale = ops.quantize(x, fmt, mode)
    shifted_qdata, shifted_scale = ops.quantize(x * 2.0**power, fmt, mode)
    if mode != RCEIL:  # whose rounded log2 blurs the thresholds where |log2| is large
        assert_same_bytes(shifted_qdata, qdata)
        assert torch.equal(shifted_scale.float(), scale.float() * 2.0**power)
    once = ops.dequantize(qdata, scale, fmt, torch.float32)
    if mode in (RCEIL, ScaleCalculationMode.CEIL):  # nothing saturates: quantizing again is exact
        assert torch.equal(ops.fake_quantize(once, fmt, mode), once)
