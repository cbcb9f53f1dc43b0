"""QAT of one linear layer, forward + backward, against bf16 and torchao.

    python -m benchmarks.layers.qat_linear [--shape M K N ...] [--no-torchao]

Before any time: the fake-quantized forward must equal the converted layer's bit for bit, and the gradients
of x, weight and bias must agree with an fp32 product of the dequantized operands.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.qat import MXFakeQuantizeConfig as TorchaoFakeQuantizeConfig
from torchao.prototype.qat import MXFakeQuantizedLinear as TorchaoFakeQuantizedLinear
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from benchmarks.layers import linear as layer
from benchmarks.shared import harness
from torchao_mx import MXDynamicActivationMXWeightConfig, MXWeightOnlyConfig, ops

E2M1, E4M3 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
CONFIGS: dict[str, AOBaseConfig] = {
    "W4A4": MXDynamicActivationMXWeightConfig(E2M1, E2M1),
    "W4A8": MXDynamicActivationMXWeightConfig(E4M3, E2M1),
    "W4A16": MXWeightOnlyConfig(E2M1),
    "W8A8": MXDynamicActivationMXWeightConfig(E4M3, E4M3),
}
TORCHAO = {"torchao MXFP4": E2M1, "torchao MXFP8": E4M3}


def prepared(linear: nn.Linear, config: AOBaseConfig) -> nn.Module:
    return layer.prepared(linear, QATConfig(config, step="prepare"))


def check(linear: nn.Linear, config: Any, x: torch.Tensor, dy: torch.Tensor, name: str) -> None:
    model = prepared(linear, config)
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    weight, bias = model[0].weight, model[0].bias
    wq = ops.fake_quantize(weight, config.weight_spec.format).float()
    xq = x.detach().float()
    if config.activation_spec is not None:
        xq = ops.fake_quantize(x, config.activation_spec.format).detach().float()
    harness.gate(f"{name} dX", harness.relative_error(x.grad, dy.float() @ wq) < 5e-3)
    harness.gate(f"{name} dW", harness.relative_error(weight.grad, dy.float().t() @ xq) < 5e-3)
    harness.gate(f"{name} dbias", harness.relative_error(bias.grad, dy.float().sum(0)) < 5e-3)
    quantize_(model, QATConfig(config, step="convert"))
    harness.gate(f"{name} converted", torch.equal(y, model(x)))


def torchao_models(linear: nn.Linear) -> dict[str, nn.Module]:
    """torchao's QAT layers, which lose the bias gradient; eager and compiled."""
    models = {}
    for name, dtype in TORCHAO.items():
        config = TorchaoFakeQuantizeConfig(dtype)
        layer = TorchaoFakeQuantizedLinear.from_linear(copy.deepcopy(linear), config, config)
        models[f"{name}, eager"] = layer
        models[f"{name}, compiled"] = torch.compile(copy.deepcopy(layer), dynamic=False)
    return models


def bench_shape(m: int, k: int, n: int, with_torchao: bool) -> list[harness.Row]:
    linear, x, dy = layer.operands(m, k, n)
    for name, config in CONFIGS.items():
        check(linear, config, x, dy, name)
    models: dict[str, nn.Module] = {layer.BASELINE: nn.Sequential(copy.deepcopy(linear))}
    models |= {name: prepared(linear, config) for name, config in CONFIGS.items()}
    theirs = torchao_models(linear) if with_torchao else {}
    return layer.measure(models | theirs, x, dy, eager_only=tuple(theirs))


def main() -> None:
    parser = layer.parser(__doc__)
    parser.add_argument("--no-torchao", action="store_true", help="skip torchao's own QAT layers")
    args = parser.parse_args()
    harness.require_gpu()
    torch.manual_seed(0)
    rows = []
    for i, shape in enumerate(args.shape or layer.SHAPES):
        rows += bench_shape(*shape, with_torchao=not args.no_torchao and i == 0)
    layer.report("qat_linear", {}, rows)


if __name__ == "__main__":
    main()
