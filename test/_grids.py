"""The inputs and configs that several test files walk, and how results are compared."""

import functools

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXFP4,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    MXDynamicActivationMXWeightConfig,
    MXWeightOnlyConfig,
    ScaleCalculationMode,
    reference,
)

MX_FORMATS = (MXFP4, MXFP8_E4M3, MXFP8_E5M2)
FORMATS = (*MX_FORMATS, NVFP4)
MODES = tuple(ScaleCalculationMode)
RCEIL = ScaleCalculationMode.RCEIL
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Formats with each mode that they read.
FORMAT_MODES = (*((f, m) for f in MX_FORMATS for m in MODES), (NVFP4, RCEIL))

E2M1, E4M3, E5M2 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e5m2
BASES = {
    "w4a16": MXWeightOnlyConfig(),
    "w4a16_floor": MXWeightOnlyConfig(scaling_mode=ScaleCalculationMode.FLOOR),
    "w8a16": MXWeightOnlyConfig(E4M3),
    "w8a16_e5m2": MXWeightOnlyConfig(E5M2),
    "nvfp4_weight_only": MXWeightOnlyConfig(block_size=16),
    "w4a4": MXDynamicActivationMXWeightConfig(E2M1, E2M1),
    "w4a4_even": MXDynamicActivationMXWeightConfig(
        E2M1, E2M1, scaling_mode=ScaleCalculationMode.EVEN
    ),
    "w8a8": MXDynamicActivationMXWeightConfig(),
    "w4a8": MXDynamicActivationMXWeightConfig(E4M3, E2M1),
    "w8a4": MXDynamicActivationMXWeightConfig(E2M1, E5M2),
    "nvfp4": MXDynamicActivationMXWeightConfig(E2M1, E2M1, block_size=16),
}


def name_of(value):
    """A test id for formats, modes and dtypes."""
    if isinstance(value, ScaleCalculationMode):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.name if hasattr(value, "name") else None


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def from_bits(bits, dtype):
    """Integers as the floats that have these bits."""
    return bits.to(torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)


def randn(*shape, dtype=torch.float32, seed=0):
    """Gaussians whose rows differ in magnitude, so that mixed-up scales show."""
    g = generator(seed)
    x = torch.randn(shape, generator=g)
    if len(shape) > 1:
        x = x * torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1), generator=g))
    return x.to(dtype)


def _fill(amax, seed=0):
    """Blocks of 32 led by ``amax [R]`` with magnitudes up to it behind."""
    rest = torch.rand(len(amax), 31, generator=generator(seed)) * 2 - 1
    return torch.cat([amax[:, None], (amax[:, None] * rest.to(amax.dtype))], 1)


def bf16_every_pattern():
    """Every bit pattern, 32 neighbours a block."""
    return from_bits(torch.arange(1 << 16), torch.bfloat16).view(-1, 32)


def bf16_every_maximum():
    """Every bit pattern leading a block of smaller magnitudes."""
    return _fill(bf16_every_pattern().flatten())


def bf16_shuffled():
    """Every bit pattern among others of any magnitude, NaN blocks thinned out by sorting NaNs last."""
    x = bf16_every_pattern().flatten()
    finite, rest = x[~x.isnan()], x[x.isnan()]
    order = torch.randperm(len(finite), generator=generator())
    return torch.cat([finite[order], rest]).view(-1, 32)


def fp32_random_bits(rows=20_000):
    bits = torch.randint(-(2**31), 2**31, (rows, 64), generator=generator())
    return from_bits(bits, torch.float32)


def fp32_every_exponent():
    """Gaussians at every power of two, subnormals and overflow to Inf included."""
    exponent = torch.arange(-149, 129).repeat_interleave(32)[:, None]
    x = torch.randn(len(exponent), 64, generator=generator(), dtype=torch.float64)
    return (x * torch.exp2(exponent.double())).float()


def fp32_near_thresholds(exponents=range(-126, 128)):
    """Maxima a few units around each mantissa where some mode's scale steps up.

    1: FLOOR and CEIL; 1.5 and 1.75: RCEIL, whose log2, rounded to fp32, reads up to 22 units past a
    power of two (33 past 1.5) as that power; 1.75, 1.875 and 1.9375: EVEN for 1, 2 and 3 mantissa bits.
    """
    power = torch.exp2(torch.tensor(list(exponents)).double()).float()
    amax = []
    for mantissa, above in ((1.0, 4), (1.5, 40), (1.75, 40), (1.875, 4), (1.9375, 4)):
        edge = (power * mantissa).view(torch.int32)
        amax.append(edge[:, None] + torch.arange(-4, above))
    return _fill(torch.cat([a.flatten() for a in amax]).int().view(torch.float32))


def special_blocks():
    """Zeros of both signs, subnormals, Inf, NaN, lone giants: what single blocks may hold."""
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    x = torch.zeros(16, 32)
    x[1] = -0.0
    x[2, ::2] = -0.0
    x[3] = tiny
    x[4] = 2.0**-149
    x[5] = torch.linspace(-tiny, tiny, 32)
    x[6] = huge
    x[7] = torch.linspace(-huge, huge, 32)
    x[8] = torch.arange(32) - 16.0
    x[8, 3] = float("inf")
    x[9] = -float("inf")
    x[10] = torch.arange(32) - 16.0
    x[10, 5] = float("nan")
    x[11] = float("nan")
    x[12, 0], x[12, 1] = float("inf"), float("nan")
    x[13] = torch.arange(32) - 16.0
    x[13, 0] = 1e30
    x[14] = 2.0**-127
    x[15] = -(2.0**-126)
    return x


GRIDS = {
    grid.__name__: functools.cache(grid)
    for grid in (
        bf16_every_pattern,
        bf16_every_maximum,
        bf16_shuffled,
        fp32_random_bits,
        fp32_every_exponent,
        fp32_near_thresholds,
        special_blocks,
    )
}


def finite(x):
    """``x`` with NaN as zero and magnitudes cut to 1e30, to take a per-tensor scale from."""
    return torch.nan_to_num(x.float(), 0.0, 1e30, -1e30).clamp(-1e30, 1e30)


def as_bytes(x):
    """The tensor's bytes, in its own order of elements."""
    return x.contiguous().reshape(-1 if x.dim() == 0 else x.shape).view(torch.uint8)


def assert_same_bytes(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(as_bytes(actual), as_bytes(expected))


def assert_same_values(actual, expected):
    """Bit for bit, signs of zeros included; a NaN equals any NaN."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert_same_bytes(actual.masked_fill(nan, 0), expected.masked_fill(nan, 0))


def linear(bias=True, dtype=torch.float32, device="cpu", k=64, n=96, seed=1):
    """A model of one layer, rows of its weight differing in magnitude."""
    model = nn.Sequential(nn.Linear(k, n, bias, device=device, dtype=dtype))
    if device != "meta":
        with torch.no_grad():
            model[0].weight.copy_(randn(n, k, seed=seed))
            if bias:
                model[0].bias.copy_(randn(n, seed=seed + 1))
    return model


def quantize(model, config, **kwargs):
    quantize_(model, config, **kwargs)
    return model


def prepare(model, base, **kwargs):
    return quantize(model, QATConfig(base, step="prepare"), **kwargs)


def convert(model, base=None, **kwargs):
    return quantize(model, QATConfig(base, step="convert"), **kwargs)


def state_of(model):
    """All that a refusal must leave alone."""
    tensors = {
        name: as_bytes(getattr(t, "qdata", t)).tolist() for name, t in model.state_dict().items()
    }
    modules = [(name, type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()]
    return tensors, modules, str(model), [id(p) for p in model.parameters()]


def refused(model, config, **kwargs):
    """A call of quantize_ for ``refusals``, which must leave no trace in the model."""

    def call():
        before = state_of(model)
        try:
            quantize_(model, config, **kwargs)
        finally:
            assert state_of(model) == before

    return call


def of_type(kind):
    """A filter_fn for quantize_."""
    return lambda module, fqn: isinstance(module, kind)


def quantized(x, spec):
    """``x`` as a product sees it, fake-quantized on the CPU by the reference; itself without a spec."""
    if spec is None or x.numel() == 0:
        return x.detach()
    here, pts = x.detach().cpu(), None
    if spec.format.has_per_tensor_scale:
        pts = reference.per_tensor_scale(here, spec.format)
    values = reference.fake_quantize(here, spec.format, spec.scaling_mode, per_tensor_scale=pts)
    return values.to(x.device)


def refusals(calls, errors=(TypeError, ValueError)):
    """The messages of calls that raise, each with its error's type, by line."""
    lines = []
    for call in calls:
        with pytest.raises(errors) as info:
            call()
        lines.append(f"{info.type.__name__}: {info.value}")
    return "\n".join(lines)


def relative_error(actual, expected):
    """||actual - expected|| / ||expected||, in float64."""
    assert actual.shape == expected.shape
    actual, expected = (t.detach().cpu().double() for t in (actual, expected))
    norm = torch.linalg.vector_norm(expected)
    assert norm > 0, "nothing to compare with"
    return (torch.linalg.vector_norm(actual - expected) / norm).item()


def assert_close(actual, expected, dtype=None):
    """Relative error below what products in ``dtype`` (default: actual's) may round away."""
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    error = relative_error(actual, expected)
    assert error <= bound[dtype or actual.dtype], f"relative error {error:.2e}"
