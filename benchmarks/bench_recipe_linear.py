"""NVFP4 forward, MXFP8 backward: one linear layer, forward + backward, against bf16 and NVFP4 QAT.

    python benchmarks/bench_recipe_linear.py [--shape M K N ...]

Before any time: Y, dX, dW and dbias must agree with fp32 products of the reference's operands, and the
converted layer must compute the trained forward, bit for bit where products are emulated.
"""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
from collections.abc import Callable

import harness
import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.quantize_.common import KernelPreference

from torchao_mx import (
    MXDynamicActivationMXWeightConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    reference,
)
from torchao_mx.ops.block_scaled_mm import has_block_scaled_gemms

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


def prepared(linear: nn.Linear, config: AOBaseConfig) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(linear))
    quantize_(model, config)
    return model


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def check(
    linear: nn.Linear,
    config: NVFP4ForwardMXFP8BackwardConfig,
    x: torch.Tensor,
    dy: torch.Tensor,
    name: str,
) -> None:
    model = prepared(linear, config)
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
        harness.gate(f"{name} {what}", relative_error(actual, want[what]) < BOUND)
    harness.gate(f"{name} dbias", relative_error(bias.grad, dy.float().sum(0)) < BOUND)
    quantize_(model, NVFP4ForwardMXFP8BackwardConfig(step="convert"))
    if config == EMULATED or not has_block_scaled_gemms(x.device):
        harness.gate(f"{name} converted", torch.equal(y, model(x)))


def step_of(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    x = x.detach().clone().requires_grad_()

    def step() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return step


def bench_shape(m: int, k: int, n: int) -> list[harness.Row]:
    linear = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    for name, config in RECIPES.items():
        check(linear, config, x, dy, name)
    models: dict[str, nn.Module] = {"bf16": nn.Sequential(copy.deepcopy(linear))}
    models["NVFP4 QAT, bf16 bwd"] = prepared(linear, QATConfig(NVFP4_PTQ, step="prepare"))
    models |= {name: prepared(linear, config) for name, config in RECIPES.items()}
    steps = {name: step_of(model, x, dy) for name, model in models.items()}
    first = {name: harness.first_call_s(step) for name, step in steps.items()}
    peak = {name: harness.peak_mb(step) for name, step in steps.items()}
    graphs = {name: harness.captured(step) for name, step in steps.items()}
    rows = []
    for name, model in models.items():
        ms, ratio = harness.paired_ms(steps[name], steps["bf16"])
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.6), sharey=True)
    labels = [r["layer"] for r in rows]
    for ax, key, heading in (
        (left, "ratio", "forward + backward, ratio to bf16"),
        (right, "peak_mb", "peak memory over the model, MB"),
    ):
        colors = ["#888888" if name == "bf16" else "#4c72b0" for name in labels]
        bars = ax.barh(labels, [r[key] for r in rows], color=colors)
        ax.bar_label(bars, fmt="%.2f" if key == "ratio" else "%.0f", padding=3)
        ax.set_xlabel(heading)
        ax.margins(x=0.12)
    left.axvline(TARGET, color="black", lw=0.8, ls="--")
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
    args = parser.parse_args()
    harness.require_gpu()
    if has_block_scaled_gemms(torch.device("cuda", torch.cuda.current_device())):
        RECIPES["NVFP4 fwd, MXFP8 bwd, emulated"] = EMULATED
    torch.manual_seed(0)
    shapes = args.shape or [(8192, 4096, 4096), (1024, 4096, 4096), (8192, 4096, 14336)]
    rows = [row for shape in shapes for row in bench_shape(*shape)]
    png = harness.save("recipe_linear", dict(dtype="bfloat16", bias=True, target=TARGET), rows)
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
