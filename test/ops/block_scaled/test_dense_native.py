"""The seam to block-scaled GEMMs on a GPU that is not here: who takes it, and what torch is handed.

``F.scaled_mm`` is replaced by one that has torch's own meta function check its arguments for a CUDA device, then
takes the scales out of their tiles with torchao's ``from_blocked`` and multiplies what torchao decodes.
"""

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from _grids import E4M3, E5M2, assert_close, assert_same_bytes, linear, name_of, quantize, randn
from _recipes import CONFIG, K, N, step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torchao.prototype.mx_formats.mx_tensor import to_dtype
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.mx_formats.utils import from_blocked
from torchao.quantization.quantize_.common import KernelPreference

from torchao_mx import (
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    NVFP4ForwardMXFP8BackwardConfig,
    ops,
    reference,
)
from torchao_mx.ops.block_scaled import native as _native
from torchao_mx.ops.block_scaled import recipe_linear as OP

SEAM = importlib.import_module("torchao_mx.ops.block_scaled.dense")
PAIRS = [
    (NVFP4, NVFP4),
    (MXFP8_E4M3, MXFP8_E4M3),
    (MXFP8_E5M2, MXFP8_E4M3),
    (MXFP8_E4M3, MXFP8_E5M2),
]
each_pair = pytest.mark.parametrize(("a_format", "b_format"), PAIRS, ids=name_of)


def operand(x, fmt):
    pts = reference.per_tensor_scale(x, fmt) if fmt.has_per_tensor_scale else None
    return SEAM.Operand(fmt, ops.quantize(x, fmt, per_tensor_scale=pts), pts)


def arguments(a, b, dtype=torch.bfloat16):
    """Of the op."""
    return (
        *a.packed, a.per_tensor_scale, *b.packed, b.per_tensor_scale, a.format.name, b.format.name, dtype,
    )  # fmt: skip


def torchs_check(*args, **kwargs):
    """The meta function of torch's scaled matmul, told that the tensors are CUDA's."""

    def there(t):
        if isinstance(t, list):
            return [there(item) for item in t]
        if not isinstance(t, torch.Tensor):
            return t
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with FakeTensorMode():
        return SCALED_MM(*(there(a) for a in args), **kwargs)


SCALED_MM = F.scaled_mm


def decoding_scaled_mm(
    a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, *, output_dtype
):
    """``F.scaled_mm`` by what its arguments mean; b is ``[C, S]``."""
    args = (a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b)
    out = torchs_check(*args, output_dtype=output_dtype)
    values = []
    for matrix, scales, recipes, swizzles in (
        (a, scale_a, recipe_a, swizzle_a),
        (b.t(), scale_b, recipe_b, swizzle_b),
    ):
        block = {F.ScalingType.BlockWise1x16: 16, F.ScalingType.BlockWise1x32: 32}[recipes[0]]
        assert swizzles[0] == F.SwizzleType.SWIZZLE_32_4_4
        columns = matrix.shape[1] * (2 if block == 16 else 1)
        scale = from_blocked(scales[0].view(torch.uint8), len(matrix), columns // block)
        scale = scale.contiguous().view(scales[0].dtype)
        if block == 16:
            assert (recipes[1], swizzles[1]) == (F.ScalingType.TensorWise, F.SwizzleType.NO_SWIZZLE)
            assert scales[1].shape == (1,) and scales[1].dtype == torch.float32
            tensor = NVFP4Tensor(matrix.view(torch.uint8), scale, 16, torch.float32, scales[1][0])
            values.append(tensor.dequantize(torch.float32))
        else:
            assert len(scales) == len(recipes) == len(swizzles) == 1
            values.append(to_dtype(matrix.contiguous(), scale, matrix.dtype, 32, torch.float32))
    y = (values[0].double() @ values[1].double().mT).to(output_dtype)
    assert (out.shape, out.dtype) == (y.shape, y.dtype)
    return y


@pytest.fixture
def calls(monkeypatch):
    """The CPU taken for a GPU of compute capability 10.0; the operands' dtypes of its scaled matmuls."""
    seen = []

    def scaled_mm(a, b, *args, **kwargs):
        seen.append((a.dtype, b.dtype))
        return decoding_scaled_mm(a, b, *args, **kwargs)

    monkeypatch.setattr(_native, "has_block_scaled_gemms", lambda device: True)
    monkeypatch.setattr(_native, "_verdicts", {})
    monkeypatch.setattr(SEAM, "block_scaled_mm_op", SEAM._native_product)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    assert SEAM._is_native(torch.device("cpu"))  # the products that verify it
    seen.clear()
    return seen


@pytest.mark.parametrize(
    ("capability", "has"),
    [
        ((8, 0), False),
        ((8, 9), False),
        ((9, 0), False),
        ((10, 0), True),
        ((10, 3), True),
        ((12, 0), True),
    ],
)
def test_capability_decides(monkeypatch, capability, has):
    monkeypatch.setattr(_native, "capability", lambda index: capability)
    assert _native.has_block_scaled_gemms(torch.device("cuda:0")) is has
    assert _native.has_block_scaled_gemms(torch.device("cpu")) is False


def test_what_is_taken(calls):
    takes = SEAM.takes_block_scaled_mm
    x = torch.empty(3, 64, dtype=torch.bfloat16)
    assert all(takes(x, 64, pair) for pair in PAIRS)
    assert not takes(x, 64, (MXFP8_E5M2, MXFP8_E5M2))  # torch has no product of two E5M2 operands
    assert not takes(x, 48, (NVFP4, NVFP4))  # rows of 24 bytes
    assert takes(x, 48, (MXFP8_E4M3, MXFP8_E4M3))
    assert not takes(x.float(), 64, PAIRS[0]) and not takes(x.half(), 64, PAIRS[0])


@each_pair
@pytest.mark.parametrize(
    "shape", [(1, 32, 32), (33, 96, 64), (200, 160, 320), (128, 256, 512)], ids=str
)
def test_layout(calls, a_format, b_format, shape):
    """Scales of several tiles, ragged and whole: what torch is handed means what the operands do."""
    r, s, c = shape
    a, b = operand(randn(r, c), a_format), operand(randn(s, c, seed=1), b_format)
    y = SEAM._native_product(*arguments(a, b, torch.float32))
    want = [
        ops.dequantize(*o.packed, o.format, torch.float32, per_tensor_scale=o.per_tensor_scale)
        for o in (a, b)
    ]
    assert_close(y, want[0].double() @ want[1].double().mT)
    assert len(calls) == 1


def test_the_check_is_torchs(calls):
    """Arguments that the GPU would refuse are refused here."""
    a, b = operand(randn(32, 64), MXFP8_E4M3), operand(randn(40, 64), MXFP8_E4M3)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        SEAM._native_product(*arguments(a, b))
    swapped = a._replace(packed=(a.packed[0], a.packed[1][:, :1]))
    with pytest.raises(RuntimeError, match="for MX scaling scale_a must have"):
        SEAM._native_product(
            *arguments(swapped._replace(packed=(a.packed[0], a.packed[1].repeat(1, 4))), a)
        )


@each_pair
def test_op(a_format, b_format, device):
    """Where the GPU has no such GEMM, and on the CPU: the product of the decoded operands."""
    a, b = (
        operand(randn(33, 64).to(device), a_format),
        operand(randn(96, 64, seed=1).to(device), b_format),
    )
    args = arguments(a, b)
    opcheck(
        SEAM.block_scaled_mm_op, args, test_utils=["test_autograd_registration", "test_faketensor"]
    )
    values = [
        ops.dequantize(*o.packed, o.format, torch.float32, per_tensor_scale=o.per_tensor_scale)
        for o in (a, b)
    ]
    bias = torch.ones(96, dtype=torch.bfloat16, device=device)
    y = SEAM.block_scaled_mm(a, b, torch.bfloat16, bias)
    assert_close(y, values[0].double() @ values[1].double().mT + 1)


def emulated(config):
    return dataclasses.replace(config, kernel_preference=KernelPreference.EMULATED)


NATIVE = {"e4m3": CONFIG, "grad_e5m2": NVFP4ForwardMXFP8BackwardConfig(E4M3, E5M2),
          "stochastic": NVFP4ForwardMXFP8BackwardConfig(stochastic_rounding=True)}  # fmt: skip


def test_no_rows_need_no_product(calls):
    x = randn(0, K, dtype=torch.bfloat16)
    y, dx, *gradients = step(
        quantize(linear(dtype=torch.bfloat16), CONFIG), x, randn(0, N).bfloat16()
    )
    assert y.shape == (0, N) and dx.shape == (0, K) and not calls
    assert all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("rows", [1, 33, 128])
@pytest.mark.parametrize("config", NATIVE.values(), ids=NATIVE)
def test_a_layer_runs_natively(calls, config, rows):
    """Three products of packed operands, and the emulated layer's results but for roundings to bf16."""
    x, dy = (randn(rows, n, dtype=torch.bfloat16, seed=n) for n in (K, N))
    model = quantize(linear(dtype=torch.bfloat16), config)
    torch.manual_seed(0)
    native = step(model, x, dy)
    fp4, grad = torch.float4_e2m1fn_x2, config.grad_dtype
    assert calls == [(fp4, fp4), (grad, E4M3), (grad, E4M3)]
    model = quantize(linear(dtype=torch.bfloat16), emulated(config))
    torch.manual_seed(0)
    wanted = step(model, x, dy)
    assert len(calls) == 3
    for got, want in zip(native, wanted, strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want.double(), torch.bfloat16)


def test_operands_of_a_native_layer_are_packed_only(calls, monkeypatch):
    forms = []
    op = OP.quantize_both_op
    monkeypatch.setattr(OP, "quantize_both_op", lambda *args: forms.append(args[5]) or op(*args))
    x, dy = (randn(33, n, dtype=torch.bfloat16, seed=n) for n in (K, N))
    step(quantize(linear(dtype=torch.bfloat16), CONFIG), x, dy)
    assert forms == [["rows", "columns"], ["rows"], ["rows", "columns"], ["columns"]]


@pytest.mark.parametrize(
    ("config", "dtype", "k"),
    [
        (emulated(CONFIG), torch.bfloat16, K),
        (NVFP4ForwardMXFP8BackwardConfig(E5M2, E5M2), torch.bfloat16, K),
        (CONFIG, torch.float32, K),
        (CONFIG, torch.float16, K),
        (CONFIG, torch.bfloat16, 48),
    ],
    ids=["preference", "e5m2_twice", "fp32", "fp16", "narrow"],
)
def test_what_is_emulated_there_too(calls, config, dtype, k):
    x, dy = randn(33, k, dtype=dtype), randn(33, N, dtype=dtype, seed=3)
    results = step(quantize(linear(dtype=dtype, k=k), config), x, dy)
    assert not calls
    wanted = step(quantize(linear(dtype=dtype, k=k), emulated(config)), x, dy)
    for actual, expected in zip(results, wanted, strict=True):
        assert_same_bytes(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 128])
@pytest.mark.parametrize("config", NATIVE.values(), ids=NATIVE)
def test_on_a_gpu_that_has_them(config, rows):
    if not _native.has_block_scaled_gemms(torch.device("cuda:0")):
        pytest.skip("needs compute capability 10.0")
    x, dy = (randn(rows, n, dtype=torch.bfloat16, seed=n).cuda() for n in (K, N))
    results = []
    for there in (config, emulated(config)):
        model = quantize(linear(dtype=torch.bfloat16, device="cuda"), there)
        torch.manual_seed(0)
        results.append(step(model, x, dy))
    for got, want in zip(*results, strict=True):
        assert_close(got, want.double(), torch.bfloat16)
