"""LoRA on a frozen MXFP4 linear layer, against bf16 nn.Linear + LoRA; from one row to many.

    python -m benchmarks.layers.lora_linear [--quick] [--shape K N ...] [--rows M ...] [--first-step]

The baseline is a frozen bf16 ``nn.Linear`` plus ``F.linear(F.linear(x, A), B) * s``. Ours is
``ops.lora_matmul`` on the packed weight, and the layer that ``MXWeightOnlyLoRAConfig`` makes of the
``nn.Linear`` ("bf16, module"). "decode all" is the baseline behind ``ops.dequantize`` in every step.
``lora.py`` tells what is measured and in which order. A run of a part writes
``lora_linear_part-<gpu>``, and ``--first-step`` takes no other times and writes
``lora_linear_first_step-<gpu>``.

The forward targets of decode sizes are of the time in a CUDA graph: a layer alone, launched eagerly, costs
its launches whatever it computes.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_

from benchmarks.layers import lora
from benchmarks.layers.lora import Case, Variant
from benchmarks.shared import harness
from torchao_mx import MXFP4, MXWeightOnlyLoRAConfig, ops

SHAPE = (4096, 14336)
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
HEAD = {"shape": "K x N", "rows": "M"}
FEW, MANY = 64, 4096  # rows up to which, and from which on, there are targets
FEW_TARGETS = {"ratio": 0.9, "graph_ratio": 0.9, "forward_ratio": 0.45}
MANY_TARGETS = {"ratio": 1.05}
FIRST_STEPS = ("4096:14336:16:bf16", "4096:14336:4096:bf16", "4096:14336:4096:fp8, dX too")


class Packed(NamedTuple):
    """One weight set: ``W [N, K]`` packed, and in bf16 as the baseline's layer."""

    qdata: torch.Tensor
    scale: torch.Tensor
    linear: nn.Linear


class Problem:
    """A layer's weight sets and adapters. Without ``dequantized`` no decoder runs: see lora_grouped."""

    def __init__(self, k: int, n: int, dequantized: bool = True) -> None:
        self.k, self.n = k, n
        self.a, self.b = lora.random_adapters((), n, k)
        self.sets, self.modules = [], []
        config = MXWeightOnlyLoRAConfig(r=lora.RANK, lora_alpha=lora.RANK * lora.SCALING)
        for _ in range(lora.weight_sets(n * k)):
            w_NK = torch.randn(n, k, device=lora.DEVICE, dtype=torch.bfloat16) * k**-0.5
            self.modules.append(self._module(w_NK, config))
            qdata, scale = ops.quantize(w_NK, MXFP4)
            w_NK = ops.dequantize(qdata, scale, MXFP4) if dequantized else w_NK
            self.sets.append(Packed(qdata, scale, _linear(w_NK)))

    def _module(self, w_NK: torch.Tensor, config: MXWeightOnlyLoRAConfig) -> nn.Module:
        """The layer that the config makes, with these adapters."""
        model = nn.Sequential(_linear(w_NK.clone()))
        quantize_(model, config)
        with torch.no_grad():
            model[0].lora_A.copy_(self.a)
            model[0].lora_B.copy_(self.b)
        return model[0]

    def baseline(self, x: torch.Tensor) -> Variant:
        leaves = (x, self.a, self.b)

        def forward(i: int) -> torch.Tensor:
            low_rank = F.linear(F.linear(x, self.a), self.b)
            return self.sets[i].linear(x) + low_rank * lora.SCALING

        return Variant(lora.BASELINE, forward, lambda i: leaves)

    def variant(self, name: str, x: torch.Tensor) -> Variant:
        """Ours, one of ``lora.COMPUTE``."""

        def product(i: int, **options: Any) -> torch.Tensor:
            w = self.sets[i]
            return ops.lora_matmul(
                x, w.qdata, w.scale, MXFP4, self.a, self.b, lora.SCALING, **options
            )

        targets = _targets(x.shape[0]) if name == "bf16" else {}
        return lora.ours(name, product, (x, self.a, self.b), targets)

    def others(self, x: torch.Tensor) -> list[Variant]:
        """The module, and the baseline on weights decoded in every step."""

        def decode_all(i: int) -> torch.Tensor:
            w_NK = ops.dequantize(self.sets[i].qdata, self.sets[i].scale, MXFP4)
            low_rank = F.linear(F.linear(x, self.a), self.b)
            return F.linear(x, w_NK) + low_rank * lora.SCALING

        leaves = (x, self.a, self.b)
        return [self.module(x), Variant("decode all, then bf16", decode_all, lambda i: leaves)]

    def module(self, x: torch.Tensor) -> Variant:
        return Variant(
            "bf16, module",
            lambda i: self.modules[i](x),
            lambda i: (x, self.modules[i].lora_A, self.modules[i].lora_B),
            bounded_peak=True,
            targets=_targets(x.shape[0]),
        )

    def operands(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x ``[M, K]`` and dY ``[M, N]``."""
        x, dy = (
            torch.randn(rows, columns, device=lora.DEVICE, dtype=torch.bfloat16)
            for columns in (self.k, self.n)
        )
        return x.requires_grad_(), dy

    def case(self, x: torch.Tensor, dy: torch.Tensor, card: lora.Card) -> Case:
        bound_ms = card.bound_ms(self.n * self.k, x.shape[0], self.n, self.k)
        want = lora.wanted_of_rows(x, self.sets[0].linear.weight, self.a, self.b, dy)
        head = dict(shape=f"{self.k} x {self.n}", rows=x.shape[0])
        return Case(head, dy, len(self.sets), want, bound_ms)


def _linear(w_NK: torch.Tensor) -> nn.Linear:
    """A layer without bias, frozen; nothing is initialised only to be overwritten."""
    layer = nn.Linear(w_NK.shape[1], w_NK.shape[0], bias=False, device="meta", dtype=w_NK.dtype)
    layer.weight = nn.Parameter(w_NK, requires_grad=False)
    return layer


def _targets(rows: int) -> dict[str, float]:
    return FEW_TARGETS if rows <= FEW else MANY_TARGETS if rows >= MANY else {}


def bench_shape(
    k: int, n: int, rows: Sequence[int], quick: bool, card: lora.Card, results: lora.Results
) -> None:
    problem = Problem(k, n)
    for m in rows:
        x, dy = problem.operands(m)
        case = problem.case(x, dy, card)
        names = lora.QUICK if quick else lora.COMPUTE
        variants = [problem.baseline(x)] + [problem.variant(name, x) for name in names]
        results.add(case, variants + ([problem.module(x)] if quick else problem.others(x)))


def first_step_of(point: str) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """A step of ours and of the baseline, of K:N:M:variant."""
    k, n, rows, name = point.split(":")
    problem = Problem(int(k), int(n), dequantized=False)
    x, dy = problem.operands(int(rows))
    return problem.variant(name, x).step(dy), problem.baseline(x).step(dy)


def plot(rows: list[harness.Row], path: pathlib.Path) -> None:
    metrics = {
        "ratio": "forward + backward",
        "graph_ratio": "forward + backward in a CUDA graph",
        "forward_ratio": "forward in a CUDA graph",
    }
    panels = [
        lora.Panel(f"{shape}: {text}", [r for r in rows if r["shape"] == shape], "rows", column)
        for shape in dict.fromkeys(r["shape"] for r in rows)
        for column, text in metrics.items()
    ]
    title = f"{torch.cuda.get_device_name()}, LoRA r={lora.RANK} on an MXFP4 linear layer (K x N)"
    lora.plot_ratios(panels, path, title)


def bench(args: argparse.Namespace, card: lora.Card, results: lora.Results) -> None:
    rows = args.rows or ((1, 16, 64, 4096, 16384) if args.quick else ROWS)
    for k, n in args.shape or [SHAPE]:
        bench_shape(k, n, rows, args.quick, card, results)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("K", "N"))
    parser.add_argument("--quick", action="store_true", help="no forced strategy, fewer M")
    lora.Benchmark("lora_linear", __file__, HEAD, FIRST_STEPS, first_step_of, bench, plot).main(
        parser
    )


if __name__ == "__main__":
    main()
