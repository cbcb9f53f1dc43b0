"""What the two LoRA benchmarks share: cases and variants, their gate and clock, targets, tables, first steps.

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

A limit beside a figure is a target that this project set itself; ``target`` says whether the figure keeps it.

A first step is timed in a process of its own, twice: with an empty Triton cache (cold), then with what that
left (warm). Before it the process takes a step of the bf16 baseline, which loads CUDA's libraries; the
seconds of that step are reported beside.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import pathlib
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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

COLUMNS = {
    "variant": "variant",
    "ms": "fwd + bwd ms",
    "ratio": "ratio",
    "graph_ms": "in a graph, ms",
    "graph_ratio": "ratio",
    "forward_ms": "fwd in a graph, ms",
    "forward_ratio": "ratio",
    "share": "of bound",
    "graph_share": "graph, of bound",
    "forward_share": "fwd graph, of bound",
    "peak_mb": "peak MB",
    "first_s": "first step s",
    "target": "target",
}
FIRST_STEP_HEAD = {"point": "first step of"}
FIRST_STEP_COLUMNS = {
    "cold_s": "cold s",
    "warm_s": "warm s",
    "baseline_cold_s": "baseline s, cold",
    "baseline_warm_s": "baseline s, warm",
    "target": "target",
}
FIRST_STEP_LIMITS = {"cold_s": 20.0, "warm_s": 1.0}
TARGET_NAMES = {
    "ratio": "ratio",
    "graph_ratio": "graph ratio",
    "forward_ms": "fwd ms",
    "forward_ratio": "fwd ratio",
    "peak_mb": "peak",
    "cold_s": "cold",
    "warm_s": "warm",
}
STYLES = {
    "bf16": ("#1f4e9c", "-", 2.2),
    "bf16, module": ("#17a2b8", "-", 1.6),
    "fp8": ("#e08214", "-", 1.6),
    "fp8, dX too": ("#b2182b", "-", 1.6),
    "bf16, fused": ("#7fb0e6", ":", 1.4),
    "bf16, unpack": ("#6aa84f", ":", 1.4),
    "decode all, then bf16": ("#999999", "-.", 1.2),
}
OTHER_STYLE = ("#8e44ad", "-", 1.2)


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


def ours(
    name: str,
    product: Callable[..., torch.Tensor],
    leaves: Sequence[torch.Tensor],
    targets: dict[str, float],
) -> Variant:
    """``product(i, **options)`` with the options of ``COMPUTE[name]``."""
    options = COMPUTE[name]
    tolerance = FP8_TOLERANCE if "compute_dtype" in options else BF16_TOLERANCE
    forward = functools.partial(product, **options)
    return Variant(name, forward, lambda i: leaves, tolerance, bounded_peak=True, targets=targets)


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
    return harness.relative_error(got, want) <= tolerance


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


@dataclass
class Results:
    """Rows, and what could not be measured; a fault of one variant leaves the others their figures."""

    rows: list[harness.Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def add(self, case: Case, variants: Sequence[Variant]) -> None:
        """Measure the variants, the first of which is the baseline."""
        baseline: Timed | None = None
        peak_limit = 0.0
        figures = []
        for variant in variants:
            name = f"{case.title}, {variant.name}"
            try:
                row, timed = measure(case, variant, baseline)
            except (Exception, harness.WrongResult) as error:
                if isinstance(error, NotImplementedError) and baseline is not None:
                    print(f"{name}: left out: {first_line(error)}")
                else:
                    if not isinstance(error, harness.WrongResult):
                        traceback.print_exception(error)
                    self.fail(f"{name}: {type(error).__name__}: {first_line(error)}")
                if baseline is None:
                    return
                continue
            if baseline is None:
                baseline, peak_limit = timed, row["peak_mb"] + PEAK_ALLOWANCE_MB
            limits = variant.targets | ({"peak_mb": peak_limit} if variant.bounded_peak else {})
            self.rows.append(row | with_targets(row, limits))
            figure = row["forward_ratio"] if row["ratio"] is None else row["ratio"]
            figures.append(f"{variant.name} {'-' if figure is None else f'{figure:.2f}'}")
        print(f"[{self.seconds:3.0f} s] {case.title}: {' | '.join(figures)}", flush=True)

    def fail(self, message: str) -> None:
        print(f"FAILED: {message}", flush=True)
        self.failures.append(message)

    def first_steps(self, name: str, file: str, points: Sequence[str]) -> None:
        """``--first-step-of POINT`` of the script in ``file``, cold and warm; reports what it got to."""
        try:
            for point in points:
                self._first_step(file, point)
        finally:
            self.report(name, {}, FIRST_STEP_HEAD, FIRST_STEP_COLUMNS)

    def _first_step(self, file: str, point: str) -> None:
        with tempfile.TemporaryDirectory() as cache:
            try:
                cold, warm = (harness.fresh_process(file, point, cache) for _ in range(2))
            except (subprocess.SubprocessError, ValueError, LookupError) as error:
                self.fail(f"first step of {point}: {error}")
                return
        row = dict(
            point=point, cold_s=cold["first_s"], warm_s=warm["first_s"],
            baseline_cold_s=cold["baseline_s"], baseline_warm_s=warm["baseline_s"],
        )  # fmt: skip
        self.rows.append(row | with_targets(row, FIRST_STEP_LIMITS))
        print(
            f"[{self.seconds:3.0f} s] {point}: {row['cold_s']:.2f} s, {row['warm_s']:.2f} s",
            flush=True,
        )

    def report(
        self,
        name: str,
        meta: harness.Row,
        head: dict[str, str],
        columns: dict[str, str] = COLUMNS,
        plot: Callable[[list[harness.Row], pathlib.Path], None] | None = None,
        add: bool = False,
    ) -> None:
        """JSON, table and PNG, and last the targets: what the end of a log should show.

        With ``add`` the file's rows of other cases stay.
        """
        if self.rows:
            if add:
                self.rows = harness.with_saved_rows(name, self.rows, list(head))
            meta = meta | dict(seconds=self.seconds, failures=self.failures)
            png = harness.save(name, meta, self.rows)
            print(harness.markdown(self.rows, head | columns))
            self._print_targets([*head, "variant"])
            print(f"{self.seconds:.0f} s; {png.with_suffix('.json')}")
            if plot is not None:
                plot(self.rows, png)
        for message in self.failures:
            print(f"FAILED: {message}")

    def _print_targets(self, where: list[str]) -> None:
        """All of them, but of those for memory, which every row has, only the missed."""
        checks = [(row, check) for row in self.rows for check in row["checks"]]
        print(f"\nTargets met: {sum(check['met'] for _, check in checks)} of {len(checks)}")
        for row, check in checks:
            if check["column"] == "peak_mb" and check["met"]:
                continue
            place = " ".join(str(row[key]) for key in where if key in row)
            value = "-" if check["value"] is None else f"{check['value']:.3f}"
            print(f"  {_verdict(check):12s} {place}: {TARGET_NAMES[check['column']]} {value}"
                  f" ≤ {check['limit']:g}")  # fmt: skip


def with_targets(row: harness.Row, limits: dict[str, float]) -> harness.Row:
    """``checks`` for the JSON, ``target`` for the table: upper limits and whether ``row`` keeps them."""
    checks, texts = [], []
    for column, limit in limits.items():
        value = row[column]
        met = value is not None and value <= limit
        checks.append(dict(column=column, value=value, limit=limit, met=met))
        shown = f"{limit:.0f}" if limit >= 100 else f"{limit:g}"
        texts.append(f"{TARGET_NAMES[column]} ≤ {shown} {_verdict(checks[-1])}")
    return dict(checks=checks, target="; ".join(texts) or None)


def _verdict(check: harness.Row) -> str:
    return "not measured" if check["value"] is None else "met" if check["met"] else "MISSED"


class Panel(NamedTuple):
    """``column`` of the rows over their ``x``, a line a variant."""

    title: str
    rows: list[harness.Row]
    x: str
    column: str


def plot_ratios(panels: list[Panel], path: pathlib.Path, title: str) -> None:
    """Ratios on logarithmic axes, the baseline at 1, targets as bars in the colour of their variant."""
    plt = harness.pyplot()
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    n_columns = min(4, len(panels) + 1)
    n_rows = math.ceil((len(panels) + 1) / n_columns)
    size = (4.4 * n_columns, 3.7 * n_rows)
    figure, grid = plt.subplots(n_rows, n_columns, figsize=size, sharey=True)
    axes = list(grid.flat)
    lines: dict[str, Line2D] = {}
    for ax, panel in zip(axes, panels, strict=False):
        marks: set[tuple[int, float]] = set()
        for variant, points in _lines(panel):
            color, style, width = STYLES.get(variant, OTHER_STYLE)
            lines[variant], *_ = ax.plot(
                [row[panel.x] for row in points], [row[panel.column] for row in points],
                color=color, ls=style, lw=width, marker="o", ms=3.5,
            )  # fmt: skip
            for row in points:
                for check in row["checks"]:
                    mark = (row[panel.x], check["limit"])
                    if check["column"] == panel.column and mark not in marks:
                        marks.add(mark)
                        ax.plot(*mark, "_", color=color, ms=15, mew=2.5)
        ax.axhline(1, color="black", lw=1, ls="--")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ticks = sorted({row[panel.x] for row in panel.rows})
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_major_locator(FixedLocator([1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.5, 2, 4, 8]))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel("M")
    low, high = axes[0].get_ylim()  # of all panels
    axes[0].set_ylim(min(max(low, 1 / 8), 0.4), max(min(high, 8), 1.5))
    handles = {**lines, "bf16 weights": Line2D([], [], color="black", lw=1, ls="--")}
    handles["target of that colour"] = Line2D(
        [], [], color="#555555", ls="", marker="_", ms=15, mew=2.5
    )
    for ax in axes[len(panels) :]:
        ax.axis("off")
    axes[len(panels)].legend(handles.values(), handles.keys(), loc="center", frameon=False)
    harness.save_figure(figure, path, f"{title}: time as a ratio to bf16 weights (lower is faster)")


def _lines(panel: Panel) -> Iterator[tuple[str, list[harness.Row]]]:
    for variant in dict.fromkeys(row["variant"] for row in panel.rows):
        points = [row for row in panel.rows if row["variant"] == variant]
        points = [row for row in points if row[panel.column] is not None]
        if points and variant != BASELINE:
            yield variant, sorted(points, key=lambda row: row[panel.x])


def print_first_step(step: Callable[[int], None], baseline_step: Callable[[int], None]) -> None:
    """What a fresh process answers: JSON on its last line."""
    baseline_s = harness.first_call_s(functools.partial(baseline_step, 0))
    first_s = harness.first_call_s(functools.partial(step, 0))
    print(json.dumps(dict(first_s=first_s, baseline_s=baseline_s)))


@dataclass(frozen=True)
class Benchmark:
    """What only one of the two scripts knows: its options are its own, the rest of ``main`` is here."""

    name: str
    file: str
    head: dict[str, str]
    first_steps: Sequence[str]
    first_step_of: Callable[[str], tuple[Callable[[int], None], Callable[[int], None]]]
    bench: Callable[[argparse.Namespace, Card, Results], None]
    plot: Callable[[list[harness.Row], pathlib.Path], None]

    def main(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, nargs="+", help="these M only")
        parser.add_argument(
            "--first-step",
            nargs="*",
            metavar="POINT",
            help="first steps alone, of the usual points or these",
        )
        parser.add_argument("--add", action="store_true", help="to the file of a whole run")
        parser.add_argument("--first-step-of", help=argparse.SUPPRESS)
        args = parser.parse_args()
        harness.require_gpu()
        torch.manual_seed(0)
        if args.first_step_of:
            print_first_step(*self.first_step_of(args.first_step_of))
            return
        results = Results()
        if args.first_step is not None:
            points = args.first_step or self.first_steps
            results.first_steps(f"{self.name}_first_step", self.file, points)
            raise SystemExit(bool(results.failures))
        whole = args.add or vars(args) == vars(parser.parse_args([]))
        card = Card.measure()
        print(f"copy {card.copy_gbs:.0f} GB/s, bf16 matmul {card.tflops:.0f} TFLOP/s", flush=True)
        try:
            self.bench(args, card, results)
        finally:
            meta = dict(dtype="bfloat16", rank=RANK, scaling=SCALING, format=MXFP4.name)
            meta |= dict(copy_gbs=card.copy_gbs, bf16_tflops=card.tflops)
            name = self.name if whole else f"{self.name}_part"
            results.report(name, meta, self.head, plot=self.plot, add=args.add)
        raise SystemExit(bool(results.failures))
