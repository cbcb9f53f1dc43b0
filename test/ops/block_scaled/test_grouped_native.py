"""The seam to grouped block-scaled GEMMs on a GPU that is not here: its layout, who takes it, whether it is trusted.

``F.scaled_grouped_mm`` is replaced by one that takes each group's scales out of their tiles with torchao's
``from_blocked`` and multiplies what torchao decodes; of MXFP8 torch's own meta function checks the arguments
before. The layouts are torchao's, byte for byte.
"""

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from _experts import EXPERTS, Concatenated, GptOss, inputs
from _grids import E5M2, assert_close, generator, name_of, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torchao.prototype.moe_training.kernels.mxfp8 import (
    torch_to_blocked_2d_K_groups,
    torch_to_blocked_2d_M_groups,
    torch_to_blocked_per_group_3d,
)
from torchao.prototype.mx_formats.mx_tensor import to_dtype
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.mx_formats.utils import from_blocked
from torchao.quantization import quantize_
from torchao.quantization.quantize_.common import KernelPreference

from torchao_mx import (
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    NVFP4ForwardMXFP8BackwardConfig,
    NVFP4MXFP8Experts,
    is_experts,
    ops,
    reference,
)
from torchao_mx.ops.block_scaled import native

SEAM = importlib.import_module("torchao_mx.ops.block_scaled.grouped")
RECIPE = importlib.import_module("torchao_mx.nn.recipes.experts")
CONFIG = NVFP4ForwardMXFP8BackwardConfig()
NATIVE = {
    "e4m3": CONFIG,
    "grad_e5m2": dataclasses.replace(CONFIG, grad_dtype=E5M2),  # forward alone
    "stochastic": dataclasses.replace(CONFIG, stochastic_rounding=True),
}
EMULATED = dataclasses.replace(CONFIG, kernel_preference=KernelPreference.EMULATED)
# End offsets and how many there are in all: tiles of 128 rows, or blocks of 32 columns in tiles of 4.
ROWS = {"ragged": ([5, 38, 170, 171], 180), "empty": ([0, 130, 130, 260], 260), "nobody": ([0, 0, 0, 0], 9),
        "whole": ([128, 256, 384, 640], 640)}  # fmt: skip
COLUMNS = {"ragged": ([32, 192, 256, 416], 480), "empty": ([0, 96, 96, 224], 224),
           "nobody": ([0, 0, 0, 0], 64), "whole": ([128, 256, 384, 640], 640)}  # fmt: skip
each_rows = pytest.mark.parametrize(("ends", "n"), ROWS.values(), ids=ROWS)
each_columns = pytest.mark.parametrize(("ends", "n"), COLUMNS.values(), ids=COLUMNS)
each_format = pytest.mark.parametrize("fmt", [NVFP4, MXFP8_E4M3], ids=name_of)


def offsets(ends):
    return torch.tensor(ends, dtype=torch.int32)


def scale_bytes(*shape):
    return torch.randint(1, 255, shape, dtype=torch.uint8, generator=torch.manual_seed(0))


def packed(fmt, *shape, seed=0):
    """(qdata, scale, per-tensor scale) of random values."""
    x = randn(*shape, dtype=torch.bfloat16, seed=seed)
    pts = None
    if fmt.has_per_tensor_scale:
        pts = reference.per_tensor_scale(x, fmt, len(shape) == 3)
    return (*ops.quantize(x, fmt, per_tensor_scale=pts), pts)


# --- layout ---------------------------------------------------------------------------------------


@each_rows
@pytest.mark.parametrize("blocks", [1, 4, 6])
def test_rows_are_laid_out_as_torchaos(ends, n, blocks):
    scale = scale_bytes(n, blocks)
    whole = F.pad(scale, (0, -blocks % 4))  # torchao's takes whole tiles of columns
    wanted, starts = torch_to_blocked_2d_M_groups(whole, offsets(ends))
    blocked = SEAM.blocked_rows(scale, offsets(ends))
    assert blocked.shape[0] % 128 == 0 and blocked.shape[1] == whole.shape[1]
    used = int(starts[-1])
    assert torch.equal(blocked[:used], wanted[:used])


@each_columns
@pytest.mark.parametrize("rows", [3, 128, 200])
def test_columns_are_laid_out_as_torchaos(ends, n, rows):
    scale, ends = scale_bytes(rows, n // 32), offsets(ends) // 32
    wanted, starts = torch_to_blocked_2d_K_groups(scale, ends)
    blocked = SEAM.blocked_columns(scale, ends)
    assert blocked.shape[0] == wanted.shape[0] and blocked.shape[1] % 4 == 0
    used = int(starts[-1]) * len(blocked)
    assert torch.equal(blocked.flatten()[:used], wanted.flatten()[:used])


@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 128, 4), (2, 200, 6)], ids=str)
def test_experts_are_laid_out_as_torchaos(shape):
    scale = scale_bytes(*shape)
    assert torch.equal(SEAM.blocked_experts(scale), torch_to_blocked_per_group_3d(scale))


# --- what torch is handed -------------------------------------------------------------------------


def torchs_check(a, b, scale_a, scale_b, offs):
    """The meta function of torch's grouped product of MXFP8 operands, told that the tensors are CUDA's."""
    with FakeTensorMode():
        there = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for t in (a, b, scale_a, scale_b, offs)
        ]
        *args, offs = there
        return torch._scaled_grouped_mm(*args, offs=offs, out_dtype=torch.bfloat16)


def decoded(matrix, blocked, pts):
    """Values of one group's matrix ``[R, C]``, packed, with its scales in tiles."""
    is_fp4 = matrix.dtype == torch.float4_e2m1fn_x2
    block, columns = (16, 2 * matrix.shape[1]) if is_fp4 else (32, matrix.shape[1])
    scale = from_blocked(blocked.view(torch.uint8), len(matrix), columns // block)
    scale = scale.contiguous().view(blocked.dtype)
    matrix = matrix.contiguous()
    if is_fp4:
        tensor = NVFP4Tensor(matrix.view(torch.uint8), scale, 16, torch.float32, pts)
        return tensor.dequantize(torch.float32).double()
    return to_dtype(matrix, scale, matrix.dtype, 32, torch.float32).double()


def decoding_product(
    a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, *, offs, output_dtype
):
    """``F.scaled_grouped_mm`` by what its arguments mean; b is ``[E, C, S]`` or ``[C, S]``."""
    is_fp4, n_groups = a.dtype == torch.float4_e2m1fn_x2, len(offs)
    by_block = F.ScalingType.BlockWise1x16 if is_fp4 else F.ScalingType.BlockWise1x32
    tensorwise = [F.ScalingType.TensorWise] if is_fp4 else []
    assert recipe_a == recipe_b == [by_block, *tensorwise]
    none = [F.SwizzleType.NO_SWIZZLE] * len(tensorwise)
    assert swizzle_a == swizzle_b == [F.SwizzleType.SWIZZLE_32_4_4, *none]
    for scales in (scale_a, scale_b):
        assert len(scales) == 1 + is_fp4
        assert all(s.shape == (n_groups,) and s.dtype == torch.float32 for s in scales[1:])
    if not is_fp4:
        out = torchs_check(a, b, scale_a[0], scale_b[0], offs)
    a_pts, b_pts = (s[1] if is_fp4 else [None] * n_groups for s in (scale_a, scale_b))
    b, per_byte, block = b.mT, 1 + is_fp4, 16 if is_fp4 else 32
    a_tiles, b_tiles = (s[0].flatten() for s in (scale_a, scale_b))
    results, start, at = [], 0, [0, 0]

    def taken(tiles, which, rows, blocks):
        size = -(-rows // 128) * 128 * (-(-blocks // 4) * 4)
        at[which] += size
        return tiles[at[which] - size : at[which]]

    for e, end in enumerate(offs.tolist()):
        if b.dim() == 3:
            blocks = a.shape[1] * per_byte // block
            x = a[start:end]
            x = decoded(x, taken(a_tiles, 0, len(x), blocks), a_pts[e]) if len(x) else None
            w = decoded(b[e], taken(b_tiles, 1, b.shape[1], blocks), b_pts[e])
            results.append(torch.zeros(0, len(w)).double() if x is None else x @ w.T)
        else:
            here = slice(start // per_byte, end // per_byte)
            size = (end - start) // block
            if size:
                x = decoded(a[:, here], taken(a_tiles, 0, len(a), size), a_pts[e])
                w = decoded(b[:, here], taken(b_tiles, 1, len(b), size), b_pts[e])
                results.append(x @ w.T)
            else:
                results.append(torch.zeros(len(a), len(b)).double())
        start = end
    if b.dim() == 3:  # rows of nobody are left as they were found
        results.append(torch.full((len(a) - start, b.shape[1]), torch.nan).double())
        y = torch.cat(results)
    else:
        y = torch.stack(results)
    y = y.to(output_dtype)
    assert is_fp4 or out.shape == y.shape
    return y


@pytest.fixture
def calls(monkeypatch):
    """The CPU taken for a GPU of compute capability 10.0; (dtype, groups are rows) of its products."""
    seen = []

    def product(a, b, *args, **kwargs):
        seen.append((a.dtype, b.dim() == 3))
        return decoding_product(a, b, *args, **kwargs)

    monkeypatch.setattr(native, "has_block_scaled_gemms", lambda device: True)
    monkeypatch.setattr(native, "_verdicts", {})
    monkeypatch.setattr(F, "scaled_grouped_mm", product)
    for module in (SEAM, RECIPE):
        monkeypatch.setattr(module, "grouped_block_scaled_mm_op", SEAM._native_product)
    assert SEAM._is_native(torch.device("cpu"))
    seen.clear()
    return seen


def assert_same(y, wanted):
    assert y.shape == wanted.shape
    if wanted.any():
        assert_close(y, wanted)
    else:
        assert not y.any()


@each_format
@each_rows
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_product_of_groups_of_rows(calls, fmt, ends, n, with_bias):
    c, s = 192, 96
    bias = randn(EXPERTS, s, dtype=torch.bfloat16, seed=2) if with_bias else None
    args = (*packed(fmt, n, c), *packed(fmt, EXPERTS, s, c, seed=1), bias, offsets(ends), fmt.name)
    y = SEAM._native_product(*args, torch.float32)
    assert len(calls) == 1
    assert_same(y[: ends[-1]], SEAM._decoded_product(*args, torch.float32)[: ends[-1]])
    assert not y[ends[-1] :].any()


@each_columns
def test_product_of_groups_of_columns(calls, ends, n):
    fmt = MXFP8_E4M3
    operands = (*packed(fmt, 96, n), *packed(fmt, 160, n, seed=1))
    args = (*operands, None, offsets(ends), fmt.name, torch.float32)
    y = SEAM._native_product(*args)
    assert len(calls) == 1
    assert_same(y, SEAM._decoded_product(*args))


@each_format
@pytest.mark.parametrize("grouped", ["rows", "columns"])
def test_op(fmt, grouped, device):
    """Where the GPU has no such GEMM, and on the CPU: an expert at a time, of the decoded operands."""
    ends, n = (ROWS if grouped == "rows" else COLUMNS)["ragged"]
    b_shape = (EXPERTS, 96, n) if grouped == "columns" else (EXPERTS, 96, 192)
    a_shape = (n, 192) if grouped == "rows" else (160, n)
    b_shape = b_shape if grouped == "rows" else b_shape[1:]
    a, b = packed(fmt, *a_shape), packed(fmt, *b_shape, seed=1)
    args = [t if t is None else t.to(device) for t in (*a, *b, None, offsets(ends))]
    args += [fmt.name, torch.bfloat16]
    y = SEAM.grouped_block_scaled_mm_op(*args).cpu()
    tests = ["test_autograd_registration", "test_faketensor"]
    opcheck(SEAM.grouped_block_scaled_mm_op, args, test_utils=tests)
    x, w = (
        reference.dequantize(q, s, fmt, torch.float32, -1, pts).double() for q, s, pts in (a, b)
    )
    start = 0
    for e, end in enumerate(ends):
        mine = slice(start, end)
        if grouped == "rows":
            assert_close(y[mine], x[mine] @ w[e].T)
        elif start < end:
            assert_close(y[e], x[:, mine] @ w[:, mine].T)
        start = end
    assert grouped == "columns" or not y[start:].any()


# --- who takes it ---------------------------------------------------------------------------------


def test_what_is_taken(calls):
    takes, x = SEAM.takes_grouped_block_scaled_mm, torch.empty(3, 64, dtype=torch.bfloat16)
    assert takes(x, 64, NVFP4) and takes(x, 64, MXFP8_E4M3)
    assert not takes(x, 48, NVFP4)  # rows of 24 bytes
    assert not takes(x, 64, MXFP8_E5M2)  # torch's grouped product has E4M3 alone
    assert not takes(x.float(), 64, NVFP4) and not takes(x.half(), 64, NVFP4)


def module_results(family, config, tokens=41):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"experts": family().to(torch.bfloat16)})
    quantize_(model, config, filter_fn=is_experts)
    experts = model["experts"]
    args, wanting = inputs(family, tokens, torch.bfloat16, "cpu")
    y = experts(*args)
    y.backward(torch.ones_like(y))
    return [y.detach(), *(t.grad for t in wanting), *(p.grad for p in experts.parameters())]


def product_results(config, ordered, with_bias):
    """(y, dx, dw, dbias) of one weight's product; some rows are nobody's."""
    torch.manual_seed(0)
    experts = NVFP4MXFP8Experts.from_experts(Concatenated().to(torch.bfloat16), config)
    n, k = experts.base("gate_up_proj").shape[1:]
    order = torch.randperm(42, generator=generator()).int() if ordered else None
    x = randn(21 if ordered else 42, k, dtype=torch.bfloat16).requires_grad_()
    bias = randn(EXPERTS, n, dtype=torch.bfloat16, seed=2).requires_grad_() if with_bias else None
    y = experts.operand("gate_up_proj")(x, offsets([5, 5, 37, 39]), order, bias)
    y.backward(randn(*y.shape, dtype=torch.bfloat16, seed=3))
    dbias = [bias.grad] if with_bias else []
    return [y.detach(), x.grad, experts.gate_up_proj.grad, *dbias]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("config", NATIVE.values(), ids=NATIVE)
def test_a_product_runs_natively(calls, config, ordered, with_bias):
    """Of packed operands; the emulated one's results but for roundings to bf16."""
    results = []
    emulated = dataclasses.replace(config, kernel_preference=KernelPreference.EMULATED)
    for kind, runs in ((config, True), (emulated, False)):
        results.append(product_results(kind, ordered, with_bias))
        backward = [(torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)]
        wanted = [(torch.float4_e2m1fn_x2, True)] + backward * (config.grad_dtype != E5M2)
        assert calls == (wanted if runs else [])
        calls.clear()
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want.double(), torch.bfloat16)


@pytest.mark.parametrize("family", [GptOss, Concatenated], ids=name_of)
def test_experts_run_natively(calls, family):
    """Two weights' products, forward and backward."""
    results = module_results(family, CONFIG)
    forward = [(torch.float4_e2m1fn_x2, True)] * 2
    assert calls == forward + [(torch.float8_e4m3fn, rows) for rows in (True, False)] * 2
    assert all(t.isfinite().all() and t.any() for t in results)


def test_no_rows_need_no_product(calls):
    assert all(not t.any() for t in module_results(Concatenated, CONFIG, tokens=0)) and not calls


# --- whether it is trusted ------------------------------------------------------------------------

PRODUCTS = {
    "scaled_mm": importlib.import_module("torchao_mx.ops.block_scaled.dense"),
    "scaled_grouped_mm": SEAM,
}


@pytest.fixture
def a_new_gpu(monkeypatch):
    monkeypatch.setattr(native, "has_block_scaled_gemms", lambda device: True)
    monkeypatch.setattr(native, "_verdicts", {})


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_build_of_torch_without_it(a_new_gpu, monkeypatch, name):
    """Said once, and emulated."""

    def refuse(*args, **kwargs):
        raise NotImplementedError("not compiled")

    monkeypatch.setattr(F, name, refuse)
    with pytest.warns(UserWarning, match="is emulated .* torch refuses it: not compiled"):
        assert not PRODUCTS[name]._is_native(torch.device("cpu"))
    assert not PRODUCTS[name]._is_native(torch.device("cpu"))


def test_a_product_that_is_off(a_new_gpu, monkeypatch):
    """As a swapped pair of tiles would make it."""

    def swapped(a, b, scale_a, *args, **kwargs):
        flat = scale_a[0].view(torch.uint8).flatten().clone()
        flat[:1024] = torch.cat([flat[512:1024], flat[:512]])
        first = flat.view(scale_a[0].dtype).view_as(scale_a[0])
        return decoding_product(a, b, [first, *scale_a[1:]], *args, **kwargs)

    monkeypatch.setattr(F, "scaled_grouped_mm", swapped)
    with pytest.warns(UserWarning, match="it is off by .*%"):
        assert not SEAM._is_native(torch.device("cpu"))
    wanted = product_results(EMULATED, True, True)
    for got, want in zip(product_results(CONFIG, True, True), wanted, strict=True):
        assert torch.equal(got, want)


def test_verified_once_and_not_while_a_graph_is_captured(a_new_gpu, monkeypatch):
    device, seen = torch.device("cuda", 3), []

    def products(device):
        seen.append(device)
        return [(torch.ones(2), torch.ones(2))]

    for capturing, count in ((True, 0), (False, 1), (True, 1), (False, 1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert native.is_verified("it", device, products) is (count > 0)
        assert len(seen) == count
    pairs = [(torch.tensor([torch.nan]), torch.ones(1)), (torch.ones(1), torch.ones(1))]
    with pytest.warns(UserWarning, match="off by nan"):
        assert not native.is_verified("another", device, lambda device: pairs)


def test_verified_while_a_graph_is_traced(a_new_gpu, monkeypatch):
    """On tensors that are there, not on the tracer's."""
    monkeypatch.setattr(F, "scaled_grouped_mm", decoding_product)

    def asks(x):
        return x + 1 if SEAM.takes_grouped_block_scaled_mm(x, 64, NVFP4) else x

    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    torch.compiler.reset()
    assert torch.compile(asks, fullgraph=True, backend="eager")(x).all()
    assert list(native._verdicts.values()) == [True]
