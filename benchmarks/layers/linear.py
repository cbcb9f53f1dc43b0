"""What the benchmarks of one linear layer share: a step, what is measured of it, table and picture."""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_

from benchmarks.shared import harness

SHAPES = ((8192, 4096, 4096), (1024, 4096, 4096), (8192, 4096, 14336))  # M, K, N
BASELINE = "bf16"
COLUMNS = {
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


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = harness.parser(description)
    parser.add_argument(
        "--shape", type=int, nargs=3, action="append", metavar=("M", "K", "N"), default=None
    )
    return parser


def operands(m: int, k: int, n: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """The layer in bf16, x ``[M, K]`` and dY ``[M, N]``."""
    linear = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return linear, x, torch.randn(m, n, device="cuda", dtype=torch.bfloat16)


def prepared(linear: nn.Linear, config: AOBaseConfig) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(linear))
    quantize_(model, config)
    return model


def step_of(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    x = x.detach().clone().requires_grad_()

    def step() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return step


def measure(
    models: dict[str, nn.Module], x: torch.Tensor, dy: torch.Tensor, eager_only: Sequence[str] = ()
) -> list[harness.Row]:
    """A row a model; the first is the baseline. ``eager_only`` are not captured in a CUDA graph."""
    baseline = next(iter(models))
    steps = {name: step_of(model, x, dy) for name, model in models.items()}
    first = {name: harness.first_call_s(step) for name, step in steps.items()}
    peak = {name: harness.peak_mb(step) for name, step in steps.items()}
    graphs = {n: harness.captured(step) for n, step in steps.items() if n not in eager_only}
    shape = f"{x.shape[0]} x {x.shape[1]} x {dy.shape[1]}"
    rows = []
    for name, model in models.items():
        ms, ratio = harness.paired_ms(steps[name], steps[baseline])
        graph_ms = graph_ratio = None
        if name in graphs:
            graph_ms, graph_ratio = harness.paired_ms(graphs[name], graphs[baseline])
        with torch.no_grad():
            forward_ms = harness.step_ms(functools.partial(model, x))
        rows.append(
            dict(
                shape=shape, layer=name, ms=ms, ratio=ratio, graph_ms=graph_ms, graph_ratio=graph_ratio,
                forward_ms=forward_ms, peak_mb=peak[name], first_s=first[name],
            )
        )  # fmt: skip
    return rows


def report(name: str, meta: harness.Row, rows: list[harness.Row], target: float = 1.0) -> None:
    """JSON, picture and table; ``target`` is a ratio, drawn as a line."""
    png = harness.save(name, dict(dtype="bfloat16", bias=True) | meta, rows)
    plot(rows, png, torch.cuda.get_device_name(), target)
    print(harness.markdown(rows, COLUMNS))


def plot(rows: list[harness.Row], path: pathlib.Path, title: str, target: float) -> None:
    plt = harness.pyplot()

    shape = rows[0]["shape"]
    rows = [r for r in rows if r["shape"] == shape]
    height = 1 + 0.5 * len(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, height), sharey=True)
    labels = [r["layer"] for r in rows]
    colors = [
        harness.BASELINE_COLOR
        if name == BASELINE
        else harness.OTHER_COLOR
        if "torchao" in name
        else harness.OURS_COLOR
        for name in labels
    ]
    for ax, key, heading in (
        (left, "ratio", "forward + backward, ratio to bf16"),
        (right, "peak_mb", "peak memory over the model, MB"),
    ):
        fmt = "%.2f" if key == "ratio" else "%.0f"
        harness.bars(ax, labels, [r[key] for r in rows], heading, fmt, colors)
    left.axvline(target, color="black", lw=0.8, ls="--")
    left.invert_yaxis()
    harness.save_figure(figure, path, f"{title}, one linear layer {shape} (M x K x N)")
