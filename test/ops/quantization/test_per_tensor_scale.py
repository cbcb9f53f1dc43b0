"""NVFP4's per-tensor scale: the kernels against torch's own operations, bit for bit."""

import math

import pytest
import torch
from _grids import name_of, randn
from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale

from torchao_mx import NVFP4, ops, reference
from torchao_mx.ops.quantization import amax as _amax

RECIPROCAL = torch.tensor(1 / 2688)  # fp32
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name_of
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, and several tiles for each of them."""
    monkeypatch.setattr(_amax, "AMAX", _amax.AMAX._replace(size=64))
    monkeypatch.setattr(_amax, "AMAX_PROGRAMS_PER_MULTIPROCESSOR", 3)


def expected(x, per_expert=False):
    """What a GPU's torch makes of the formula: the quotient by a number is a product with its reciprocal."""
    dims = (-2, -1) if per_expert else tuple(range(x.dim()))
    amax = x.cpu().float().abs().amax(dims, keepdim=per_expert)
    return (amax * RECIPROCAL).clamp(min=2.0**-120)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (40, 96), (5, 7, 32)], ids=str)
@pytest.mark.parametrize("per_expert", [False, True], ids=["tensor", "expert"])
@pytest.mark.usefixtures("small_tiles")
def test_kernels(kernel_device, dtype, shape, per_expert):
    x = randn(*shape, dtype=dtype).to(kernel_device)
    if per_expert and x.dim() == 2:
        x = x[None]
    vectors = () if per_expert else (x.flatten(), x.flatten()[::3])
    for t in (x, x.mT, x[..., ::2], *vectors):
        scale = _amax.amax_scale(t, NVFP4, per_expert)
        assert torch.equal(scale.cpu(), expected(t, per_expert))


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan, 2.0**-130, -448.0])
@pytest.mark.usefixtures("small_tiles")
def test_corners(kernel_device, value):
    """Wherever the value stands; a NaN is above Inf."""
    for place in (0, 63, 64, 1000, 1023):
        x = torch.zeros(1024)
        x[place] = value
        x = x.view(2, 16, 32).to(kernel_device)
        for per_expert in (False, True):
            scale = _amax.amax_scale(x, NVFP4, per_expert).cpu()
            assert torch.allclose(scale, expected(x, per_expert), 0, 0, equal_nan=True)
    x[0, 0, 0], x[1, 0, 0] = math.inf, math.nan
    assert _amax.amax_scale(x, NVFP4).isnan()
    assert _amax.amax_scale(x, NVFP4, True).isnan().flatten().tolist() == [False, True]


def test_of_no_experts(device):
    """A rank's shard may have none."""
    x = torch.empty(0, 32, 64, device=device)
    assert ops.per_tensor_scale(x, NVFP4, per_expert=True).shape == (0, 1, 1)


def test_is_torchaos(device):
    """On either device, whose quotients differ."""
    for seed in range(50):
        x = randn(64, 96, dtype=torch.bfloat16, seed=seed).to(device)
        scale = ops.per_tensor_scale(x, NVFP4)
        assert torch.equal(scale, per_tensor_amax_to_scale(x.abs().max().float()))
        assert torch.equal(scale, reference.per_tensor_scale(x, NVFP4))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    x = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    x[-1], x[5] = -3.0, 1.0
    assert ops.per_tensor_scale(x.view(-1, 1024), NVFP4) == expected(torch.tensor([3.0]))
