"""NVFP4 forward, MXFP8 backward: one linear layer, forward + backward, against bf16 and NVFP4 QAT.

    python -m benchmarks.layers.recipe_linear [--shape M K N ...]

Before any time: Y, dX, dW and dbias must agree with fp32 products of the reference's operands, and the
converted layer must compute the trained forward, bit for bit where products are emulated.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.quantize_.common import KernelPreference

from benchmarks.layers import linear as layer
from benchmarks.shared import harness
from torchao_mx import (
    MXDynamicActivationMXWeightConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    reference,
)
from torchao_mx.ops.block_scaled.native import has_block_scaled_gemms

E2M1, E4M3, E5M2 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e5m2
TARGET = 1.25
NVFP4_PTQ = MXDynamicActivationMXWeightConfig(E2M1, E2M1, block_size=16)
RECIPES = {
    "NVFP4 fwd, MXFP8 bwd": NVFP4ForwardMXFP8BackwardConfig(),
    "the same, dY in E5M2": NVFP4ForwardMXFP8BackwardConfig(E4M3, E5M2),
    "the same, dY rounded stochastically": NVFP4ForwardMXFP8BackwardConfig(
        stochastic_rounding=True
    ),
}
EMULATED = NVFP4ForwardMXFP8BackwardConfig(kernel_preference=KernelPreference.EMULATED)
BOUND = 5e-3  # relative error of a bf16 result


def check(
    linear: nn.Linear,
    config: NVFP4ForwardMXFP8BackwardConfig,
    x: torch.Tensor,
    dy: torch.Tensor,
    name: str,
) -> None:
    model = layer.prepared(linear, config)
    x, weight, bias = x.detach().clone().requires_grad_(), model[0].weight, model[0].bias
    torch.manual_seed(0)
    y = model(x)
    y.backward(dy)
    torch.manual_seed(0)
    seed = torch.randint(2**63 - 1, (), device=x.device) if config.stochastic_rounding else None
    products = reference.recipe_products(
        x.detach(),
        weight.detach(),
        dy,
        config.forward_spec,
        config.backward_spec,
        config.grad_spec,
        seed,
    )
    want = {what: a.float() @ b.float() for what, (a, b) in products._asdict().items()}
    want["y"] += bias.detach().float()
    got = {"y": y.detach(), "dx": x.grad, "dw": weight.grad}
    for what, actual in got.items():
        harness.gate(f"{name} {what}", harness.relative_error(actual, want[what]) < BOUND)
    harness.gate(f"{name} dbias", harness.relative_error(bias.grad, dy.float().sum(0)) < BOUND)
    quantize_(model, NVFP4ForwardMXFP8BackwardConfig(step="convert"))
    if config == EMULATED or not has_block_scaled_gemms(x.device):
        harness.gate(f"{name} converted", torch.equal(y, model(x)))


def bench_shape(m: int, k: int, n: int) -> list[harness.Row]:
    linear, x, dy = layer.operands(m, k, n)
    for name, config in RECIPES.items():
        check(linear, config, x, dy, name)
    models: dict[str, nn.Module] = {layer.BASELINE: nn.Sequential(copy.deepcopy(linear))}
    qat = QATConfig(NVFP4_PTQ, step="prepare")
    models["NVFP4 QAT, bf16 bwd"] = layer.prepared(linear, qat)
    models |= {name: layer.prepared(linear, config) for name, config in RECIPES.items()}
    return layer.measure(models, x, dy)


def main() -> None:
    args = layer.parser(__doc__).parse_args()
    harness.require_gpu()
    if has_block_scaled_gemms(torch.device("cuda", torch.cuda.current_device())):
        RECIPES["NVFP4 fwd, MXFP8 bwd, emulated"] = EMULATED
    torch.manual_seed(0)
    rows = [row for shape in args.shape or layer.SHAPES for row in bench_shape(*shape)]
    layer.report("recipe_linear", dict(target=TARGET), rows, TARGET)


if __name__ == "__main__":
    main()
