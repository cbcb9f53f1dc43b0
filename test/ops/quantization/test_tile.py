"""Device functions of ``ops/_tile.py`` whose exactness rests on more than their tests by way of the ops."""

import pytest
import torch
import triton
import triton.language as tl

from torchao_mx import MXFP8_E4M3, NVFP4, QuantizeSpec, ops, reference
from torchao_mx.ops.quantization import tile

pytestmark = pytest.mark.gpu  # the interpreter's fma rounds twice
CHUNK = 1 << 13


@triton.jit
def _wrong_quotients(b_ptr, wrong_ptr, off, TWICE: tl.constexpr, CHUNK: tl.constexpr):
    """How many of CHUNK mantissas a program divides wrongly by b, with a reciprocal ``off`` units off."""
    b = tl.load(b_ptr + tl.program_id(1))
    a = tile.float_of(0x3F800000 + tl.program_id(0) * CHUNK + tl.arange(0, CHUNK))
    reciprocal = tile.float_of(tile.bits_of(tl.div_rn(1.0, b)) + off)
    quotient = tile.corrected(a * reciprocal, a, b, reciprocal)
    if TWICE:
        quotient = tile.corrected(quotient, a, b, reciprocal)
    wrong = tl.sum((quotient != tl.div_rn(a, b + tl.zeros_like(a))).to(tl.int32))
    tl.store(wrong_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), wrong)


def wrong_quotients(divisors, twice, off=0):
    wrong = torch.full((len(divisors), (1 << 23) // CHUNK), -1, device="cuda", dtype=torch.int32)
    _wrong_quotients[wrong.shape[1], wrong.shape[0]](
        divisors.cuda(), wrong, off, twice, CHUNK, enable_fp_fusion=False
    )
    return wrong.sum(1).cpu()


def test_corrected_quotients_are_rounded():
    """Every mantissa, by 6 and by every e4m3 mantissa; by others after the second correction."""
    assert not wrong_quotients(torch.tensor([6.0, *(1 + torch.arange(8) / 8)]), False).any()
    near_ends = [1 + 2.0**-23, 2 - 2.0**-23, 2 - 2.0**-22, 1.5, 4 / 3]
    divisors = torch.cat([torch.tensor(near_ends), 1 + torch.rand(95)])
    assert not wrong_quotients(divisors, True).any()
    assert wrong_quotients(divisors, False, off=1 << 12).any()  # the check can fail


# On both sides of where _quick_e4m3_scale is taken, and far from it.
SCALES = [
    *(2.0**-149, 2.0**-120, 2.0**-91, 2.0**-90, 2.0**-90 * (1 + 2.0**-23), 2.0**-89 * 1.7, 1e-9),
    *(3.1415e-5, 4.7e-4, 2.0**-9, 0.013, 1.0, 1.9999999, 77.7, 1e9, 2.0**89 * 1.3),
    *(2.0**90 * (1 - 2.0**-24), 2.0**90, 2.0**91, 1e30, 2.0**127, float("inf")),
]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_amax_of_nvfp4(scale, dtype):
    """Blocks of every bf16 magnitude, Inf and NaN among them; in fp32 with mantissas of all lengths."""
    generator = torch.Generator().manual_seed(0)
    amax = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16).to(dtype)
    if dtype == torch.float32:
        amax = amax * (1 + torch.rand(amax.shape, generator=generator) / 128)
    x = amax[:, None] * (torch.rand(1 << 15, 16, generator=generator) * 2 - 1).to(dtype)
    x[:, 3] = amax
    pts = torch.tensor(scale)
    want = reference.quantize(x, NVFP4, per_tensor_scale=pts)
    spec, fp8 = QuantizeSpec(NVFP4), QuantizeSpec(MXFP8_E4M3)
    both = ops.quantize_both(x.cuda(), spec, fp8, row_scale=pts.cuda())
    for got in (ops.quantize(x.cuda(), NVFP4, per_tensor_scale=pts.cuda()), both.rows):
        for actual, wanted in zip(got, want, strict=True):
            assert torch.equal(actual.cpu().view(torch.uint8), wanted.view(torch.uint8))
