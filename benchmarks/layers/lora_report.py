"""What the two LoRA benchmarks report: rows with their targets, tables, plots, and first steps.

A limit beside a figure is a target that this project set itself; ``target`` says whether the figure keeps it.

A first step is timed in a process of its own, twice: with an empty Triton cache (cold), then with what that
left (warm). Before it the process takes a step of the bf16 baseline, which loads CUDA's libraries; the
seconds of that step are reported beside.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from benchmarks.layers.lora import (
    BASELINE,
    PEAK_ALLOWANCE_MB,
    Case,
    Timed,
    Variant,
    first_line,
    measure,
)
from benchmarks.shared import harness

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

    def first_steps(self, name: str, script: str, points: Sequence[str]) -> None:
        """``script --first-step-of POINT`` in fresh processes, cold and warm; reports what it got to."""
        try:
            for point in points:
                self._first_step(script, point)
        finally:
            self.report(name, {}, FIRST_STEP_HEAD, FIRST_STEP_COLUMNS)

    def _first_step(self, script: str, point: str) -> None:
        with tempfile.TemporaryDirectory() as cache:
            try:
                cold, warm = (_fresh_process(script, point, cache) for _ in range(2))
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
            shown = [row | _percentages(row) for row in self.rows]
            print(harness.markdown(shown, head | columns))
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


def _percentages(row: harness.Row) -> harness.Row:
    return {
        key: f"{value:.0%}"
        for key, value in row.items()
        if key.endswith("share") and value is not None
    }


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


def _fresh_process(script: str, point: str, cache: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", script, "--first-step-of", point],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def free_bytes() -> int:
    """What the card has left, what the allocator keeps but does not use counted in."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
