"""The one harness: timing that is fair, a gate before any figure, first steps, results and their pictures.

* ``graph_ms`` replays a CUDA graph: the kernels' own time, launches excluded; ``captured_cycle`` is that
  graph, for ``paired_ms`` to take in turns with another.
* ``paired_ms`` takes eager steps of a variant and of its baseline in turns, so that clocks and heat, which
  move a GEMM by ten per cent, move both alike; a ratio is the median over rounds of same-round ratios.
* Inputs are random and rotate over more bytes than L2 holds.
* ``fresh_process`` times a first step in a process of its own, with an empty Triton cache or a warm one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton

from benchmarks.shared import results
from benchmarks.shared.results import Row

OURS_COLOR, OTHER_COLOR, BASELINE_COLOR = "#4c72b0", "#c44e52", "#888888"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of a script whose head is its help."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )


def require_gpu() -> None:
    """Exit with a sentence rather than a traceback where there is nothing to measure on."""
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark measures CUDA kernels and found no GPU.")


def gpu_slug() -> str:
    """``NVIDIA H200`` as ``h200``."""
    return torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")


class WrongResult(SystemExit):
    """A kernel's result is not its oracle's; ends the program unless it has more to measure."""


def gate(name: str, passed: bool) -> None:
    """Stop before any time is printed for a kernel whose result is wrong."""
    if not passed:
        raise WrongResult(f"{name}: the result does not match its oracle; no time is reported")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the whole tensor, in the Frobenius norm."""
    return ((got.detach().float() - want).norm() / want.norm()).item()


def first_call_s(fn: Callable[[], Any]) -> float:
    """Seconds of the first call: compilation included (Triton's cache may be warm)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Clock:
    """Milliseconds since it was made, all queued work included."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"
        self.start = self._now()

    def _now(self) -> float:
        if self.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def ms(self) -> float:
        return (self._now() - self.start) * 1e3


class Deadline:
    """Minutes after which a run stops between two steps; None for never."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def __bool__(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def fresh_process(file: str, point: str, cache: str) -> Row:
    """What the benchmark in ``file`` prints as JSON, last, for ``--first-step-of POINT``.

    Raises:
        subprocess.SubprocessError, ValueError, LookupError: it failed, or its last line is no JSON.
    """
    module = pathlib.Path(file).resolve().relative_to(results.ROOT).with_suffix("").parts
    done = subprocess.run(
        [sys.executable, "-m", ".".join(module), "--first-step-of", point],
        cwd=results.ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """``step`` as a CUDA graph; calling the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def captured_cycle(fn: Callable[[int], Any], inputs: int, cycles: int = 2) -> Callable[[], None]:
    """``fn(i)`` for every input as one CUDA graph, several times over: ``cycles * inputs`` calls a replay."""

    def cycle() -> None:
        for i in range(cycles * inputs):
            fn(i % inputs)

    return captured(cycle)


def graph_ms(fn: Callable[[int], Any], inputs: int, replays: int = 10) -> float:
    """Median milliseconds of ``fn(i)`` in a replayed CUDA graph that cycles twice over the inputs."""
    replay = captured_cycle(fn, inputs)
    for _ in range(2):
        replay()
    return _median_ms(replay, replays) / (2 * inputs)


def step_ms(step: Callable[[], Any], rounds: int = 3, repeats: int = 8) -> float:
    """Median eager milliseconds of ``step``, the best of a few rounds."""
    for _ in range(3):
        step()
    return min(_median_ms(step, repeats) for _ in range(rounds))


def paired_ms(
    step: Callable[[], Any],
    baseline: Callable[[], Any],
    rounds: int = 8,
    repeats: int = 8,
    warmup: int = 20,
) -> tuple[float, float]:
    """(median eager milliseconds of ``step``, its ratio to ``baseline``), the two taken in turns.

    A GEMM slows by ten per cent as the card warms up; turns let both see the same card.
    """
    for _ in range(warmup):
        baseline()
        step()
    # A turn of some 20 ms: the host needs a few steps to be up to speed after the synchronisation before it.
    repeats = max(repeats, min(50, int(20 / max(_median_ms(step, repeats), 0.1))))
    times = [(_median_ms(baseline, repeats), _median_ms(step, repeats)) for _ in range(rounds)]
    ms = statistics.median(t for _, t in times)
    return ms, statistics.median(t / b for b, t in times)


def turns_ms(
    steps: dict[str, Callable[[], Any]],
    modes: dict[str, Callable[[], AbstractContextManager]],
    rounds: int = 6,
    warmup: int = 4,
) -> dict[str, list[float]]:
    """Of each step the median eager milliseconds in every round, in which all take their turn in their mode.

    A turn takes some 20 ms and begins with ``warmup`` steps, as entering a mode may undo what was kept; the
    first turn only tells how many steps that is.
    """
    first, times = {}, {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            is_long = first.get(name, 0) > 20
            with modes[name]():
                for _ in range(min(warmup, 2) if is_long else warmup):
                    step()
                repeats = max(2, min(50, int(20 / max(first[name], 0.1)))) if turn else 2
                ms = _median_ms(step, repeats)
            if turn:
                times[name].append(ms)
            else:
                first[name] = ms
    return times


def peak_mb(step: Callable[[], Any]) -> float:
    """Peak of memory allocated during ``step`` over what was allocated before it, in MB (1e6 bytes)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_gb(device: str) -> float:
    """Of allocated memory on this process's card; on the CPU what the process had resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def free_bytes() -> int:
    """What the card has left, what the allocator keeps but does not use counted in."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def copy_bandwidth(shape: tuple[int, int]) -> float:
    """GB/s (bytes read and written) of a bf16 device copy of this shape: the yardstick of the ops."""
    sources = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    target = [torch.empty_like(sources[0]) for _ in range(2)]
    ms = graph_ms(lambda i: target[i % 2].copy_(sources[i]), len(sources))
    return 2 * sources[0].nbytes / ms / 1e6


def moved(nbytes: int, ms: float, copy_gbs: float) -> Row:
    """Columns of an op that reads and writes ``nbytes``: its rate, and the share of a copy's."""
    return dict(gbs=nbytes / ms / 1e6, share=nbytes / ms / 1e6 / copy_gbs)


def matmul_tflops(size: int = 8192) -> float:
    """TFLOP/s of a bf16 ``size ** 3`` product of random matrices: the yardstick of the products."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / graph_ms(lambda _: torch.mm(a, b), 1) / 1e9


def host_us(calls: int = 2000) -> float:
    """Microseconds of the host for a torch op of one kernel, on which eager steps of small kernels depend."""
    x = torch.zeros(8, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        seconds = time.perf_counter() - start
    return seconds / calls * 1e6


def save(name: str, meta: Row, rows: list[Row], folder: pathlib.Path | None = None) -> pathlib.Path:
    """Write ``results/<name>-<gpu>.json``, or a run's that is no result ``<folder>/<name>.json``.

    Returns:
        The path of the PNG that belongs beside it.
    """
    path = results.path_of(name, "" if folder else gpu_slug(), folder)
    if folder is None:
        meta = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "torchao": _torchao_version(),
            "host_us": host_us(),
            **meta,
        }
    results.write(path, meta, rows)
    return path.with_suffix(".png")


def pyplot() -> Any:
    """matplotlib's, which needs no display; imported by scripts that draw alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def bars(
    ax: Any,
    labels: Sequence[str],
    values: Sequence[float],
    heading: str,
    fmt: str,
    colors: Sequence[str] | str = OURS_COLOR,
) -> None:
    """Horizontal, in order from the top once the caller has inverted the axis; each with its value."""
    ax.bar_label(ax.barh(labels, values, color=colors), fmt=fmt, padding=3)
    ax.set_xlabel(heading)
    ax.margins(x=0.12)


def save_figure(figure: Any, path: pathlib.Path, title: str) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def with_saved_rows(name: str, rows: list[Row], keys: list[str]) -> list[Row]:
    """``rows`` after those of ``results/<name>-<gpu>.json`` that have other values of ``keys``."""
    measured = {tuple(row[key] for key in keys) for row in rows}
    exists = results.path_of(name, gpu_slug()).exists()
    saved = results.read(name, gpu_slug())["rows"] if exists else []
    return [row for row in saved if tuple(row[key] for key in keys) not in measured] + rows


def markdown(rows: list[Row], columns: dict[str, str]) -> str:
    """A table of ``rows``: column key to heading, floats to sensible places, shares in per cent."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(key, row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.endswith("share"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return str(value)


def _median_ms(fn: Callable[[], Any], repeats: int) -> float:
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def _torchao_version() -> str:
    import torchao

    return getattr(torchao, "__version__", "unknown")
