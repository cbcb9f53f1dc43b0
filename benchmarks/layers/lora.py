"""What the two LoRA benchmarks measure: cases, variants, and the gate and the clock that each goes through.

A case is one problem (a shape, a routing, a number of rows): dY, and what y and the gradients are in float32.
A variant is one way to compute it. For each variant, in this order::

    the first step                seconds, whatever it compiles included
    y, dX, dA, dB                 against float32; a wrong variant is reported and gets no time
    peak memory of a step         over what was allocated before it; gradients included
    forward + backward, eager     in turns with the bf16 baseline; so are
    forward + backward, graph     the same in a CUDA graph, and
    forward, graph                alone, without gradients

The bound of a product is the larger of two times: the packed weights (of experts that have rows) read once
at the card's copy bandwidth, and 2 R N K operations at its bf16 matmul rate; a step has two such products,
and the adapters count nothing. Compute in fp8 may pass 100 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from benchmarks.shared import harness
from torchao_mx import MXFP4

DEVICE = "cuda"
RANK, SCALING = 16, 0.5
BF16_TOLERANCE, FP8_TOLERANCE = 1e-2, 6e-2  # relative errors of y and of each gradient
PEAK_ALLOWANCE_MB = 256 * 2**20 / 1e6  # over the baseline's peak
ROTATED_BYTES = 150e6  # of packed weights, several times the L2 of any card
BASELINE = "bf16 weights (baseline)"
E4M3 = torch.float8_e4m3fn

COMPUTE = {
    "bf16": {},
    "fp8": dict(compute_dtype=E4M3),
    "fp8, dX too": dict(compute_dtype=E4M3, grad_compute_dtype=E4M3),
    "bf16, fused": dict(strategy="fused"),
    "bf16, unpack": dict(strategy="unpack"),
}
QUICK = ("bf16", "fp8", "fp8, dX too")


class Wanted(NamedTuple):
    """float32 results; ``base`` is y without the adapters, for peers that have none."""

    y: torch.Tensor
    dx: torch.Tensor
    d_a: torch.Tensor
    d_b: torch.Tensor
    base: torch.Tensor


@dataclass(frozen=True)
class Variant:
    """``forward(i)`` is y with weight set i; ``leaves(i)`` are the x, A and B that it trains."""

    name: str
    forward: Callable[[int], torch.Tensor]
    leaves: Callable[[int], Sequence[torch.Tensor]]
    tolerance: float = BF16_TOLERANCE
    trains: bool = True  # otherwise a peer that computes y alone, without adapters
    in_graph: bool = True
    bounded_peak: bool = False  # whether the target for memory is meant for it
    targets: dict[str, float] = field(default_factory=dict)  # column -> upper limit

    def step(self, dy: torch.Tensor) -> Callable[[int], None]:
        def step(i: int) -> None:
            for leaf in self.leaves(i):
                leaf.grad = None
            self.forward(i).backward(dy)

        return step

    def forward_alone(self, i: int) -> None:
        with torch.no_grad():
            self.forward(i)


@dataclass(frozen=True)
class Case:
    """One problem; ``bound_ms`` is one product's, ``head`` the first columns of its rows."""

    head: harness.Row
    dy: torch.Tensor
    n_sets: int
    want: Wanted
    bound_ms: float

    @property
    def title(self) -> str:
        return " ".join(str(value) for value in self.head.values())


@dataclass(frozen=True)
class Card:
    """The two measured ceilings of the bound."""

    copy_gbs: float
    tflops: float

    @classmethod
    def measure(cls) -> Card:
        return cls(harness.copy_bandwidth((8192, 8192)), harness.matmul_tflops())

    def bound_ms(self, elements: int, rows: int, n: int, k: int) -> float:
        """Of one product: ``elements`` packed weights are read, ``rows`` are multiplied."""
        read = elements * MXFP4.bits_per_element / 8 / self.copy_gbs / 1e6
        return max(read, 2 * rows * n * k / self.tflops / 1e9)


def weight_sets(elements: int) -> int:
    """How many weights to rotate so that a packed one is never found in L2."""
    return math.ceil(ROTATED_BYTES / (elements * MXFP4.bits_per_element / 8))


def random_adapters(lead: tuple[int, ...], n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 A ``[.., r, K]`` and B ``[.., N, r]``, both far from zero, so that every gradient counts."""
    a = torch.randn(*lead, RANK, k, device=DEVICE, dtype=torch.bfloat16) / math.sqrt(k)
    b = torch.randn(*lead, n, RANK, device=DEVICE, dtype=torch.bfloat16) / 4
    return a.requires_grad_(), b.requires_grad_()


def wanted_of_rows(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dy: torch.Tensor
) -> Wanted:
    """The float32 algebra for one weight ``w [N, K]``; bf16 operands are converted."""
    x, w, a, b, dy = (t.detach().float() for t in (x, w, a, b, dy))
    h, g = x @ a.t(), SCALING * (dy @ b)
    base = x @ w.t()
    return Wanted(
        torch.addmm(base, h, b.t(), alpha=SCALING), dy @ w + g @ a, g.t() @ x,
        SCALING * (dy.t() @ h), base,
    )  # fmt: skip


def _agrees(got: torch.Tensor | None, want: torch.Tensor, tolerance: float) -> bool:
    """NaN never passes, nor does a gradient that is not there."""
    if got is None:
        return False
    return ((got.detach().float() - want).norm() / want.norm()).item() <= tolerance


def check(variant: Variant, case: Case) -> None:
    """y and every gradient of weight set 0.

    Raises:
        harness.WrongResult: one of them is not ``case.want``'s.
    """
    name = f"{case.title}, {variant.name}"
    if not variant.trains:
        with torch.no_grad():
            y = variant.forward(0)
        harness.gate(f"{name} y", _agrees(y, case.want.base, variant.tolerance))
        return
    leaves = variant.leaves(0)
    for leaf in leaves:
        leaf.grad = None
    y = variant.forward(0)
    y.backward(case.dy)
    harness.gate(f"{name} y", _agrees(y, case.want.y, variant.tolerance))
    for leaf, grad, want in zip(leaves, ("dX", "dA", "dB"), case.want[1:4], strict=True):
        harness.gate(f"{name} {grad}", _agrees(leaf.grad, want, variant.tolerance))


class Timed:
    """What is timed of a variant: a step, and two CUDA graphs of ``calls`` steps or forward passes each."""

    def __init__(self, variant: Variant, case: Case) -> None:
        step = variant.step(case.dy)
        sets = itertools.cycle(range(case.n_sets))
        # Some 1 ms a replay, so that its launch does not show.
        cycles = min(4, math.ceil(1 / (2 * case.bound_ms * case.n_sets)))
        self.calls = cycles * case.n_sets
        self.eager = (lambda: step(next(sets))) if variant.trains else None
        self.graph = self.forward = None
        if variant.in_graph:
            name = f"{case.title}, {variant.name}"
            self.forward = _captured(variant.forward_alone, case.n_sets, cycles, name)
            if variant.trains:
                self.graph = _captured(step, case.n_sets, cycles, name)


def _captured(
    fn: Callable[[int], None], n_sets: int, cycles: int, name: str
) -> Callable[[], None] | None:
    """None where this cannot be captured: a baseline that synchronises has no time in a graph."""
    try:
        return harness.captured_cycle(fn, n_sets, cycles)
    except RuntimeError as error:
        print(f"{name}: no CUDA graph: {first_line(error)}")
        return None


def _in_turns(
    step: Callable[[], None] | None, baseline: Callable[[], None] | None, calls: int = 1
) -> tuple[float | None, float | None]:
    """(ms of one of ``calls``, ratio to the baseline), in a quarter of a second where 14 pairs allow."""
    if step is None:
        return None, None
    if baseline is None:
        return harness.step_ms(step) / calls, None
    pair_ms = harness.step_ms(lambda: (baseline(), step()), rounds=1, repeats=1)
    repeats = 8 if pair_ms < 4 else 4 if pair_ms < 16 else 2
    rounds = min(12, max(4, int(250 / (repeats * pair_ms))))
    ms, ratio = harness.paired_ms(step, baseline, rounds, repeats, warmup=2)
    return ms / calls, ratio


def measure(case: Case, variant: Variant, baseline: Timed | None) -> tuple[harness.Row, Timed]:
    """A row of the table. The baseline itself is measured against itself: its ratios are the noise.

    Raises:
        harness.WrongResult: the variant's results are wrong.
    """
    step = variant.step(case.dy) if variant.trains else variant.forward_alone
    first_s = harness.first_call_s(lambda: step(0))
    check(variant, case)
    for i in range(case.n_sets):
        for leaf in variant.leaves(i):
            leaf.grad = None
    peak_mb = harness.peak_mb(lambda: step(0))
    timed = Timed(variant, case)
    baseline = baseline or timed
    ms, ratio = _in_turns(timed.eager, baseline.eager)
    graph_ms, graph_ratio = _in_turns(timed.graph, baseline.graph, timed.calls)
    forward_ms, forward_ratio = _in_turns(timed.forward, baseline.forward, timed.calls)
    row = case.head | dict(
        variant=variant.name, ms=ms, ratio=ratio, graph_ms=graph_ms, graph_ratio=graph_ratio,
        forward_ms=forward_ms, forward_ratio=forward_ratio,
        share=_share(2 * case.bound_ms, ms), graph_share=_share(2 * case.bound_ms, graph_ms),
        forward_share=_share(case.bound_ms, forward_ms), bound_ms=case.bound_ms,
        peak_mb=peak_mb, first_s=first_s,
    )  # fmt: skip
    return row, timed


def _share(bound_ms: float, ms: float | None) -> float | None:
    return None if ms is None else bound_ms / ms


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
