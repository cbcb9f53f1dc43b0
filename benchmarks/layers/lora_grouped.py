"""LoRA on frozen MXFP4 experts: one projection with its gather, against the same experts in bf16.

    python -m benchmarks.layers.lora_grouped [--quick] [--shapes A B deepseek]
        [--routings balanced dense sparse] [--rows M ...] [--first-step]

The baseline is what a careful user writes in torch: ``rows = x[order // k]``, ``torch._grouped_mm`` for W,
for A and for B, ``y.backward(dy)``: the gather and its scatter-add are in it, the sum over top_k is not.
Ours is ``ops.lora_grouped_mm`` on the packed weights, with the same x, A and B. "decode all" is the baseline
behind ``ops.dequantize`` in every step.

Routings: balanced, Gaussian logits and a bias of std 0.5 an expert, so roughly balanced but skewed; dense,
every expert has the same number of rows; sparse, 10 experts have all of them. ``lora.py`` tells what
is measured and in which order. A run of a part writes ``lora_grouped_part-<gpu>``, and ``--first-step`` takes
no other times and writes ``lora_grouped_first_step-<gpu>``.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.layers import lora, peers
from benchmarks.layers.lora import Case, Variant, Wanted
from benchmarks.shared import harness
from torchao_mx import MXFP4, ops


@dataclass(frozen=True)
class Shape:
    """W ``[experts, n, k]``, ``top_k`` rows a token."""

    experts: int
    k: int
    n: int
    top_k: int
    tokens: tuple[int, ...]
    routings: tuple[str, ...] = ("balanced", "dense")

    @property
    def elements(self) -> int:
        return self.experts * self.n * self.k


SHAPES = {
    "A": Shape(128, 2048, 1024, 8, (256, 1024, 4096, 16384)),
    "B": Shape(32, 2880, 5760, 4, (64, 512, 4096, 16384)),
    "deepseek": Shape(256, 7168, 4096, 8, (64, 512, 4096), ("balanced", "dense", "sparse")),
}
SPARSE_EXPERTS = 10
HEAD = {"shape": "shape", "routing": "routing", "tokens": "M"}

# Of the balanced routing: forward + backward, eager, ratio to the baseline; and forward in a graph, ms.
BF16_RATIOS = {
    ("A", 256): 0.60, ("A", 1024): 0.75, ("A", 4096): 0.85, ("A", 16384): 0.75,
    ("B", 64): 0.45, ("B", 512): 0.55, ("B", 4096): 0.95, ("B", 16384): 0.90,
}  # fmt: skip
FP8_RATIOS = {("A", 4096): 0.70, ("A", 16384): 0.60, ("B", 4096): 0.75, ("B", 16384): 0.65}
FORWARD_MS = {("A", 256): 0.085, ("B", 64): 0.12}
FIRST_STEPS = (
    "A:balanced:256:bf16", "A:balanced:16384:bf16", "A:balanced:4096:fp8, dX too",
    "B:balanced:4096:bf16",
)  # fmt: skip


class Packed(NamedTuple):
    """One weight set: the packed experts, and the bf16 ones ``[E, N, K]`` that the baseline multiplies."""

    qdata: torch.Tensor
    scale: torch.Tensor
    w_ENK: torch.Tensor


class Routing(NamedTuple):
    """``order`` and ``offs`` as the ops take them; ``order`` in int64 too, as argsort gives it."""

    order: torch.Tensor
    order_64: torch.Tensor
    offs: torch.Tensor
    sizes: list[int]


def random_experts(shape: Shape, dequantized: bool = True) -> Packed:
    """Expert by expert, so that no more than one is there in three forms.

    Without ``dequantized`` the bf16 experts are those from before quantization and no decoder runs.
    """
    w_ENK = torch.empty(shape.experts, shape.n, shape.k, device=lora.DEVICE, dtype=torch.bfloat16)
    packed = []
    for w_NK in w_ENK:
        w_NK.normal_(std=shape.k**-0.5)
        packed.append(ops.quantize(w_NK, MXFP4))
        if dequantized:
            w_NK.copy_(ops.dequantize(*packed[-1], MXFP4))
    qdata = torch.stack([q for q, _ in packed])
    scale = torch.stack([s.view(torch.uint8) for _, s in packed]).view(MXFP4.scale_dtype)
    return Packed(qdata, scale, w_ENK)


def route(kind: str, shape: Shape, tokens: int, device: str = lora.DEVICE) -> Routing:
    experts, top_k = shape.experts, shape.top_k
    if kind == "dense":  # tokens share out one random permutation of all experts after the other
        turns = -(-tokens * top_k // experts)
        shuffled = torch.rand(turns, experts, device=device).argsort(1)
        ids = shuffled.flatten()[: tokens * top_k].view(tokens, top_k)
    else:
        active = experts if kind == "balanced" else min(SPARSE_EXPERTS, experts)
        bias = 0.5 * torch.randn(active, device=device)
        chosen = (torch.randn(tokens, active, device=device) + bias).topk(top_k).indices
        ids = torch.randperm(experts, device=device)[:active][chosen]
    order = ids.flatten().argsort(stable=True)
    sizes = ids.flatten().bincount(minlength=experts)
    return Routing(order.int(), order, sizes.cumsum(0).int(), sizes.tolist())


def torch_experts(
    x: torch.Tensor, w_ENK: torch.Tensor, a: torch.Tensor, b: torch.Tensor, r: Routing, top_k: int
) -> torch.Tensor:
    """The baseline, given weights in bf16."""
    rows = x[r.order_64 // top_k]
    y = torch._grouped_mm(rows, w_ENK.mT, offs=r.offs)
    h = torch._grouped_mm(rows, a.mT, offs=r.offs)
    return y + lora.SCALING * torch._grouped_mm(h, b.mT, offs=r.offs)


def wanted(
    x: torch.Tensor,
    w: Packed,
    a: torch.Tensor,
    b: torch.Tensor,
    dy: torch.Tensor,
    r: Routing,
    top_k: int,
) -> Wanted:
    """float32, an expert at a time."""
    tokens = r.order_64 // top_k
    y = torch.zeros(dy.shape, device=dy.device)
    want = Wanted(y, *(torch.zeros(t.shape, device=dy.device) for t in (x, a, b, y)))
    first = 0
    for e, size in enumerate(r.sizes):
        if not size:
            continue
        rows = slice(first, first + size)
        part = lora.wanted_of_rows(x[tokens[rows]], w.w_ENK[e], a[e], b[e], dy[rows])
        want.y[rows], want.base[rows] = part.y, part.base
        want.d_a[e], want.d_b[e] = part.d_a, part.d_b
        want.dx.index_add_(0, tokens[rows], part.dx)
        first += size
    return want


class Problem:
    """A shape with its weight sets and adapters; ``routed`` makes cases of it."""

    def __init__(self, name: str, dequantized: bool = True, shape: Shape | None = None) -> None:
        self.name, self.shape = name, shape or SHAPES[name]
        n_sets = lora.weight_sets(self.shape.elements)
        self.sets = [random_experts(self.shape, dequantized) for _ in range(n_sets)]
        self.a, self.b = lora.random_adapters((self.shape.experts,), self.shape.n, self.shape.k)

    def operands(self, kind: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """x ``[T, K]``, dY ``[R, N]`` and a routing."""
        shape = self.shape
        x = torch.randn(tokens, shape.k, device=lora.DEVICE, dtype=torch.bfloat16)
        dy = torch.randn(tokens * shape.top_k, shape.n, device=lora.DEVICE, dtype=torch.bfloat16)
        return x.requires_grad_(), dy, route(kind, shape, tokens)

    def baseline(self, x: torch.Tensor, r: Routing) -> Variant:
        leaves = (x, self.a, self.b)
        return Variant(
            lora.BASELINE,
            lambda i: torch_experts(x, self.sets[i].w_ENK, *leaves[1:], r, self.shape.top_k),
            lambda i: leaves,
        )

    def variant(self, name: str, x: torch.Tensor, r: Routing, kind: str) -> Variant:
        """Ours, one of ``lora.COMPUTE``."""

        def product(i: int, **options: Any) -> torch.Tensor:
            w = self.sets[i]
            return ops.lora_grouped_mm(
                x, w.qdata, w.scale, MXFP4, r.offs, self.a, self.b, lora.SCALING, order=r.order, **options
            )  # fmt: skip

        targets = _targets(name, self.name, x.shape[0]) if kind == "balanced" else {}
        return lora.ours(name, product, (x, self.a, self.b), targets)

    def others(self, x: torch.Tensor, r: Routing) -> list[Variant]:
        """The baseline on weights decoded in every step, our product alone, and what else is installed."""
        leaves, top_k = (x, self.a, self.b), self.shape.top_k

        def decode_all(i: int) -> torch.Tensor:
            w_ENK = ops.dequantize(self.sets[i].qdata, self.sets[i].scale, MXFP4)
            return torch_experts(x, w_ENK, self.a, self.b, r, top_k)

        def without_adapters(i: int) -> torch.Tensor:
            w = self.sets[i]
            return ops.grouped_mm(x, w.qdata, w.scale, MXFP4, r.offs, order=r.order)

        name = "bf16, fwd without LoRA"
        variants = [
            Variant("decode all, then bf16", decode_all, lambda i: leaves, in_graph=False),
            Variant(name, without_adapters, lambda i: (), trains=False),
        ]
        if not peers.has_triton_kernels():
            return variants
        try:
            products = [
                peers.triton_kernels_product(w.qdata, w.scale, r.offs, r.order, top_k)
                for w in self.sets
            ]
        except Exception as error:
            print(f"triton_kernels: left out: {type(error).__name__}: {error}")
            return variants
        name = "triton_kernels, fwd without LoRA"
        return [*variants, Variant(name, lambda i: products[i](x), lambda i: (), trains=False)]

    def case(
        self, kind: str, x: torch.Tensor, dy: torch.Tensor, r: Routing, card: lora.Card
    ) -> Case:
        shape = self.shape
        active = sum(size > 0 for size in r.sizes)
        bound_ms = card.bound_ms(active * shape.n * shape.k, dy.shape[0], shape.n, shape.k)
        want = wanted(x, self.sets[0], self.a, self.b, dy, r, shape.top_k)
        head = dict(shape=self.name, routing=kind, tokens=x.shape[0])
        return Case(head, dy, len(self.sets), want, bound_ms)


def _targets(variant: str, shape: str, tokens: int) -> dict[str, float]:
    point = (shape, tokens)
    targets = {}
    if variant == "bf16" and point in BF16_RATIOS:
        targets["ratio"] = BF16_RATIOS[point]
    if variant.startswith("fp8") and point in FP8_RATIOS:
        targets["ratio"] = FP8_RATIOS[point]
    if variant == "bf16" and point in FORWARD_MS:
        targets["forward_ms"] = FORWARD_MS[point]
    return targets


def bench_shape(
    name: str, args: argparse.Namespace, card: lora.Card, results: lora.Results
) -> None:
    shape = SHAPES[name]
    bf16_bytes = 2 * shape.elements * lora.weight_sets(shape.elements)
    if harness.free_bytes() < 3 * bf16_bytes:
        print(f"{name}: left out: {bf16_bytes / 1e9:.0f} GB of bf16 weights need three times that")
        return
    problem = Problem(name)
    for kind in shape.routings:
        if kind not in args.routings:
            continue
        for tokens in shape.tokens:
            if args.rows is not None and tokens not in args.rows:
                continue
            x, dy, r = problem.operands(kind, tokens)
            case = problem.case(kind, x, dy, r, card)
            names = lora.QUICK if args.quick else lora.COMPUTE
            variants = [problem.baseline(x, r)]
            variants += [problem.variant(variant, x, r, kind) for variant in names]
            results.add(case, variants if args.quick else variants + problem.others(x, r))


def first_step_of(point: str) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """A step of ours and of the baseline, of shape:routing:tokens:variant."""
    name, kind, tokens, variant = point.split(":")
    problem = Problem(name, dequantized=False)
    x, dy, r = problem.operands(kind, int(tokens))
    ours, baseline = problem.variant(variant, x, r, kind), problem.baseline(x, r)
    return ours.step(dy), baseline.step(dy)


def plot(rows: list[harness.Row], path: pathlib.Path) -> None:
    panels = []
    for name, kind in dict.fromkeys((row["shape"], row["routing"]) for row in rows):
        s = SHAPES[name]
        title = f"{name} (E={s.experts}, K={s.k}, N={s.n}, top {s.top_k}), {kind}"
        mine = [row for row in rows if (row["shape"], row["routing"]) == (name, kind)]
        panels.append(lora.Panel(title, mine, "tokens", "ratio"))
    title = (
        f"{torch.cuda.get_device_name()}, LoRA r={lora.RANK} on MXFP4 experts, forward + backward"
    )
    lora.plot_ratios(panels, path, title)


def bench(args: argparse.Namespace, card: lora.Card, results: lora.Results) -> None:
    if args.quick:
        args.shapes = [name for name in args.shapes if name != "deepseek"]
        args.routings = ["balanced"]
    elif not peers.has_triton_kernels():
        print("triton_kernels: left out: not installed")
    for name in args.shapes:
        bench_shape(name, args, card, results)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--routings", nargs="+", default=["balanced", "dense", "sparse"])
    parser.add_argument(
        "--quick", action="store_true", help="A and B, balanced, no forced strategy"
    )
    lora.Benchmark("lora_grouped", __file__, HEAD, FIRST_STEPS, first_step_of, bench, plot).main(
        parser
    )


if __name__ == "__main__":
    main()
