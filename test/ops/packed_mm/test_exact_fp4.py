"""MXFP4 times MXFP4 on 8-bit tensor cores: exact where rows fit, recomputed where they do not."""

from __future__ import annotations

import copy

import pytest
import torch
import triton.language as tl
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import MXFP4, MXDynamicActivationMXWeightConfig, ops, reference
from torchao_mx.ops.packed_mm import exact_fp4 as mx

E2M1 = torch.float4_e2m1fn_x2
INTERPRETED = pytest.param("cpu", id="interpreted")
CUDA = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)


def spread_rows(rows: int, k: int, powers: int, seed: int = 0) -> torch.Tensor:
    """Gaussian rows, the blocks of every third of them spread over ``powers`` powers of two."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g)
    exponents = torch.randint(-powers, 1, (rows, k // 32), generator=g).repeat_interleave(32, 1)
    return torch.where(torch.arange(rows)[:, None] % 3 == 0, x * torch.exp2(exponents.float()), x)


def packed(x: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(t.to(device) for t in reference.quantize(x, MXFP4))


def values(operand: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return reference.dequantize(*operand, MXFP4, torch.float32).double()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [32, 96, 4096, 14336])
def test_unflagged_rows_are_exact_and_flags_follow_the_rule(k: int) -> None:
    x = spread_rows(301, k, powers=20)
    x[6] = 0
    x[7, :32] = torch.nan
    x[8] *= 2.0**-100
    x[10] *= 2.0**100
    x[11, 32:] = 0
    operand = packed(x, "cuda")
    fp8, row_scale, flag = mx.fp8_rows(*operand)
    byte = operand[1].view(torch.uint8).int()
    nonzero = (operand[0].unflatten(-1, (-1, 16)) & 0x77).ne(0).any(-1)
    largest = byte.amax(1)
    spread = ((largest[:, None] - byte > 14) & nonzero).any(1)
    extreme = ((largest < 64) | (largest > 190)) & nonzero.any(1)
    assert torch.equal(flag.bool(), spread | extreme)
    assert flag[7] == flag[8] == flag[10] == 1 and flag[6] == flag[11] == 0
    fits = flag == 0
    assert fits.sum() > 100
    want = reference.dequantize(*operand, MXFP4, torch.float32)
    assert torch.equal((fp8.float() * row_scale[:, None])[fits], want[fits])


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("bias", [False, True])
def test_flagged_rows_and_columns_are_recomputed_and_no_others(device: str, bias: bool) -> None:
    m, n, k = 150, 140, 96
    x, w = packed(spread_rows(m, k, 20), device), packed(spread_rows(n, k, 20, seed=1), device)
    b = torch.randn(n).to(device) if bias else None
    x_flag = torch.zeros(m, dtype=torch.int8, device=device)
    w_flag = torch.zeros(n, dtype=torch.int8, device=device)
    x_flag[[3, 130]] = 1
    w_flag[139] = 1
    y = torch.full((m, n), 7.0, device=device)
    mx.recompute_flagged(y, x, w, b, x_flag, w_flag, dot_dtype=tl.float32)
    want = values(x) @ values(w).t() + (0 if b is None else b.double())
    mine = (x_flag[:, None] | w_flag[None, :]).bool()
    # A float32 dot runs in tf32 on the GPU.
    error = (y[mine] - want[mine]).norm() / want[mine].norm()
    assert error < (1e-6 if device == "cpu" else 1e-3)
    assert (y[~mine] == 7).all()


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_no_flag_changes_nothing(device: str) -> None:
    x, w = packed(spread_rows(20, 64, 0), device), packed(spread_rows(16, 64, 0), device)
    y = torch.full((20, 16), 7.0, device=device)
    flags = torch.zeros(20, dtype=torch.int8, device=device)
    mx.recompute_flagged(y, x, w, None, flags, flags[:16], dot_dtype=tl.float32)
    assert (y == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("powers", [0, 20], ids=["fits", "spread"])
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_as_accurate_as_bf16_row_by_row(powers: int, bias: bool) -> None:
    m, n, k = 600, 272, 1056
    x = packed(spread_rows(m, k, powers).bfloat16(), "cuda")
    w = packed(spread_rows(n, k, powers, seed=1).bfloat16(), "cuda")
    b = torch.randn(n, device="cuda", dtype=torch.bfloat16) if bias else None
    y = mx.mxfp4_product_op(*x, *w, b)
    want = values(x) @ values(w).t() + (0 if b is None else b.double())
    in_bf16 = torch.nn.functional.linear(values(x).bfloat16(), values(w).bfloat16(), b)

    def worst_row(got: torch.Tensor) -> float:
        return ((got.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()

    assert worst_row(y) < 1.1 * worst_row(in_bf16)
    assert torch.equal(y, mx.mxfp4_product_op(*x, *w, b))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [mx.MIN_ROWS - 1, mx.MIN_ROWS, 3000])
@pytest.mark.parametrize("powers", [0, 20], ids=["fits", "spread"])
def test_qat_equals_the_converted_layer_on_both_sides_of_the_switch(rows: int, powers: int) -> None:
    config = MXDynamicActivationMXWeightConfig(E2M1, E2M1)
    linear = torch.nn.Linear(1024, 144, device="cuda", dtype=torch.bfloat16)
    model = torch.nn.Sequential(copy.deepcopy(linear))
    quantize_(model, QATConfig(config, step="prepare"))
    x = spread_rows(rows, 1024, powers).to("cuda", torch.bfloat16).requires_grad_()
    y = model(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    wq = ops.fake_quantize(linear.weight.detach(), MXFP4).double()
    xq = ops.fake_quantize(x.detach(), MXFP4).double()
    for got, want in (
        (x.grad, dy.double() @ wq),
        (model[0].weight.grad, dy.double().t() @ xq),
        (model[0].bias.grad, dy.double().sum(0)),
    ):
        assert (got.double() - want).norm() / want.norm() < 5e-3
    quantize_(model, QATConfig(config, step="convert"))
    assert torch.equal(y, model(x))


def test_operands_that_cannot_take_it_do_not() -> None:
    x = torch.randn(1024, 64, dtype=torch.bfloat16)
    assert not mx.takes_mxfp4_product(x, 64, "mxfp4", "mxfp4")  # on the CPU
    operand = packed(x, "cpu")
    y = mx.mxfp4_product_op(*operand, *operand, None)
    want = torch.nn.functional.linear(values(operand).bfloat16(), values(operand).bfloat16())
    assert torch.equal(y, want)
