"""QAT of one linear layer, forward + backward, against bf16 and torchao.

    python benchmarks/bench_qat_linear.py [--shape M K N ...] [--no-torchao]

Before any time: the fake-quantized forward must equal the converted layer's bit for bit, and the gradients
of x, weight and bias must agree with an fp32 product of the dequantized operands.
"""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.qat import MXFakeQuantizeConfig as TorchaoFakeQuantizeConfig
from torchao.prototype.qat import MXFakeQuantizedLinear as TorchaoFakeQuantizedLinear
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

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
    model = nn.Sequential(copy.deepcopy(linear))
    quantize_(model, QATConfig(config, step="prepare"))
    return model


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


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
    harness.gate(f"{name} dX", relative_error(x.grad, dy.float() @ wq) < 5e-3)
    harness.gate(f"{name} dW", relative_error(weight.grad, dy.float().t() @ xq) < 5e-3)
    harness.gate(f"{name} dbias", relative_error(bias.grad, dy.float().sum(0)) < 5e-3)
    quantize_(model, QATConfig(config, step="convert"))
    harness.gate(f"{name} converted", torch.equal(y, model(x)))


def step_of(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    x = x.detach().clone().requires_grad_()

    def step() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return step


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
    linear = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    for name, config in CONFIGS.items():
        check(linear, config, x, dy, name)
    models: dict[str, nn.Module] = {"bf16": nn.Sequential(copy.deepcopy(linear))}
    models |= {name: prepared(linear, config) for name, config in CONFIGS.items()}
    if with_torchao:
        models |= torchao_models(linear)
    steps = {name: step_of(model, x, dy) for name, model in models.items()}
    first = {name: harness.first_call_s(step) for name, step in steps.items()}
    peak = {name: harness.peak_mb(step) for name, step in steps.items()}
    graphs = {n: harness.captured(step) for n, step in steps.items() if "torchao" not in n}
    rows = []
    for name, model in models.items():
        ms, ratio = harness.paired_ms(steps[name], steps["bf16"])
        graph_ms = graph_ratio = None
        if name in graphs:
            graph_ms, graph_ratio = harness.paired_ms(graphs[name], graphs["bf16"])
        with torch.no_grad():
            forward_ms = harness.step_ms(functools.partial(model, x))
        rows.append(
            dict(
                shape=f"{m} x {k} x {n}", layer=name, ms=ms, ratio=ratio, graph_ms=graph_ms,
                graph_ratio=graph_ratio, forward_ms=forward_ms, peak_mb=peak[name], first_s=first[name],
            )
        )  # fmt: skip
    return rows


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = rows[0]["shape"]
    rows = [r for r in rows if r["shape"] == shape]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    labels = [r["layer"] for r in rows]
    color = [
        "#888888" if n == "bf16" else "#c44e52" if "torchao" in n else "#4c72b0" for n in labels
    ]
    for ax, key, heading in (
        (left, "ratio", "forward + backward, ratio to bf16"),
        (right, "peak_mb", "peak memory over the model, MB"),
    ):
        bars = ax.barh(labels, [r[key] for r in rows], color=color)
        ax.bar_label(bars, fmt="%.2f" if key == "ratio" else "%.0f", padding=3)
        ax.set_xlabel(heading)
        ax.margins(x=0.12)
    left.axvline(1.0, color="black", lw=0.8, ls="--")
    left.invert_yaxis()
    figure.suptitle(f"{title}, one linear layer {shape} (M x K x N)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, action="append", metavar=("M", "K", "N"), default=None
    )
    parser.add_argument("--no-torchao", action="store_true", help="skip torchao's own QAT layers")
    args = parser.parse_args()
    harness.require_gpu()
    torch.manual_seed(0)
    shapes = args.shape or [(8192, 4096, 4096), (1024, 4096, 4096), (8192, 4096, 14336)]
    rows = []
    for i, shape in enumerate(shapes):
        rows += bench_shape(*shape, with_torchao=not args.no_torchao and i == 0)
    png = harness.save("qat_linear", dict(dtype="bfloat16", bias=True), rows)
    plot(rows, png, torch.cuda.get_device_name())
    columns = {
        "shape": "M x K x N",
        "layer": "layer",
        "ms": "fwd + bwd ms",
        "ratio": "ratio to bf16",
        "graph_ms": "in a CUDA graph, ms",
        "graph_ratio": "its ratio",
        "forward_ms": "fwd ms",
        "peak_mb": "peak MB",
        "first_s": "first step s",
    }
    print(harness.markdown(rows, columns))


if __name__ == "__main__":
    main()
