"""quantize_both: share of the card's copy bandwidth, one read and all forms counted; and separate ops.

    python -m benchmarks.kernels.quantize_both [--rows 8192 --columns 4096] [--sweep]

The cases are what a linear layer under the recipe asks of an operand. Each is first compared, whole and bit
for bit, with the reference. ``--sweep`` measures every tile instead, to choose the op's constants.
"""

from __future__ import annotations

import importlib
import itertools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shared import harness
from torchao_mx import MXFP8_E4M3, NVFP4, QuantizeSpec, ops, reference

# Not `import torchao_mx.ops.quantize_both`: the package binds the verb over the module's name.
MODULE = importlib.import_module("torchao_mx.ops.quantization.quantize_both")
FP4, FP8 = QuantizeSpec(NVFP4), QuantizeSpec(MXFP8_E4M3)
TARGET = 0.70
TILES = ((32, 64), (32, 128), (64, 64), (64, 128), (128, 64))
WARPS = (1, 2, 4, 8)
STACKS = (1, 2)
REGISTERS = (None, 96)


@dataclass(frozen=True)
class Case:
    """What is asked for of one operand."""

    what: str
    row: QuantizeSpec | None
    column: QuantizeSpec | None
    forms: tuple[str, ...]
    stochastic: bool = False


CASES = (
    Case("X, emulated: NVFP4 values, MXFP8 columns", FP4, FP8, ("row_values", "columns")),
    Case("dY, emulated: MXFP8 values both ways", FP8, FP8, ("row_values", "column_values")),
    Case("dY, stochastic rounding", FP8, FP8, ("row_values", "column_values"), True),
    Case("W forward, emulated: NVFP4 values", FP4, None, ("row_values",)),
    Case("W backward, emulated: MXFP8 column values", None, FP8, ("column_values",)),
    Case("X, native: NVFP4 rows, MXFP8 columns", FP4, FP8, ("rows", "columns")),
    Case("dY, native: MXFP8 rows and columns", FP8, FP8, ("rows", "columns")),
)


def arguments(case: Case, x: torch.Tensor) -> dict[str, Any]:
    pts = seed = None
    if case.row is not None and case.row.format.has_per_tensor_scale:
        pts = ops.per_tensor_scale(x, case.row.format)
    if case.stochastic:
        seed = torch.tensor(2**40 + 1, device=x.device)
    return dict(row=case.row, column=case.column, forms=case.forms, row_scale=pts, seed=seed)


def tensors(both: ops.BothDirections) -> list[torch.Tensor]:
    forms = (f if isinstance(f, tuple) else (f,) for f in both if f is not None)
    return [t for form in forms for t in form]


def check(case: Case, x: torch.Tensor) -> None:
    kw = arguments(case, x)
    pairs = zip(
        tensors(ops.quantize_both(x, **kw)), tensors(reference.quantize_both(x, **kw)), strict=True
    )
    same = all(torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)
    harness.gate(case.what, same)


def separately(case: Case, kw: dict[str, Any]) -> Callable[[torch.Tensor], Any] | None:
    """The same forms from the ops of one direction, a launch each; they round to nearest only."""
    if case.stochastic:
        return None

    def run(x: torch.Tensor) -> None:
        for form in case.forms:
            spec, axis = (case.row, -1) if form.startswith("row") else (case.column, -2)
            pts = kw["row_scale"] if axis == -1 else None
            op = ops.fake_quantize if form.endswith("values") else ops.quantize
            op(x, spec.format, axis=axis, per_tensor_scale=pts)

    return run


def measured(case: Case, xs: list[torch.Tensor], copy_gbs: float) -> harness.Row:
    kw = arguments(case, xs[0])
    written = sum(t.nbytes for t in tensors(ops.quantize_both(xs[0], **kw)))
    ms = harness.graph_ms(lambda i: ops.quantize_both(xs[i], **kw), len(xs))
    return dict(case=case.what, ms=ms) | harness.moved(xs[0].nbytes + written, ms, copy_gbs)


def bench(case: Case, xs: list[torch.Tensor], copy_gbs: float) -> harness.Row:
    first_s = harness.first_call_s(lambda: check(case, xs[0]))
    row = measured(case, xs, copy_gbs)
    kw = arguments(case, xs[0])
    row["eager_ms"] = harness.step_ms(lambda: ops.quantize_both(xs[0], **kw))
    apart = separately(case, kw)
    row["separate_ms"] = (
        None if apart is None else harness.graph_ms(lambda i: apart(xs[i]), len(xs))
    )
    row["first_check_s"] = first_s
    print(f"{case.what:45s} {row['ms']:.4f} ms {row['share']:6.1%}")
    return row


def sweep(cases: list[Case], xs: list[torch.Tensor], copy_gbs: float) -> None:
    """Every tile of every case, the best first."""
    for case in cases:
        found = []
        for (m, k), warps, stack, registers in itertools.product(TILES, WARPS, STACKS, REGISTERS):
            if not 32 <= m * k // (32 * warps) <= 64:  # elements of a thread
                continue
            tiling = MODULE.Tiling(m, k, warps, stack, registers)
            MODULE._tiling = lambda *_, tiling=tiling: tiling
            MODULE._quantize_both_cuda.forget()
            check(case, xs[0])
            found.append((measured(case, xs, copy_gbs)["share"], str(tuple(tiling))))
        best = ", ".join(f"{tiling}: {s:.1%}" for s, tiling in sorted(found, reverse=True)[:10])
        print(f"{case.what:45s} {best}", flush=True)


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    figure, ax = plt.subplots(figsize=(10, 4))
    heading = "% of copy bandwidth, one read and all forms counted"
    cases, shares = [r["case"] for r in rows], [100 * r["share"] for r in rows]
    harness.bars(ax, cases, shares, heading, "%.0f")
    ax.axvline(100 * TARGET, color="black", lw=0.8, ls="--")
    ax.set_xlim(0, 108)
    ax.invert_yaxis()
    harness.save_figure(figure, path, title)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--sweep", action="store_true", help="measure every tile; writes nothing")
    parser.add_argument("--case", type=int, action="append", help="sweep these alone, by number")
    args = parser.parse_args()
    cases = [CASES[i] for i in args.case or range(len(CASES))]
    harness.require_gpu()
    shape = (args.rows, args.columns)
    torch.manual_seed(0)
    copy_gbs = harness.copy_bandwidth(shape)
    print(f"{torch.cuda.get_device_name()}: bf16 copy of {shape} at {copy_gbs:.0f} GB/s")
    xs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    if args.sweep:
        sweep(cases, xs, copy_gbs)
        return
    rows = [bench(case, xs, copy_gbs) for case in CASES]
    meta = dict(shape=list(shape), dtype="bfloat16", copy_gbs=copy_gbs, target=TARGET)
    png = harness.save("quantize_both", meta, rows)
    plot(rows, png, f"{torch.cuda.get_device_name()}, {args.rows} x {args.columns} bf16")
    columns = dict(case="operand and its forms", ms="ms (graph)", separate_ms="a launch each, ms",
                   eager_ms="ms (eager)", gbs="GB/s", share="of copy")  # fmt: skip
    print(harness.markdown(rows, columns))


if __name__ == "__main__":
    main()
