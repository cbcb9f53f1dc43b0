"""swiglu and its backward: share of the card's copy bandwidth.

    python -m benchmarks.kernels.swiglu [--rows 16384 65536] [--columns 2880] [--no-torch]

Bytes are counted once per input and output: forward reads x ``[R, 2 C]`` and writes y ``[R, C]``, backward
reads x and dy and writes dx. gpt-oss's form has a bias for each of 32 experts. Both directions are first
compared, whole, with torch's autograd of the formula in fp32.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.shared import harness
from torchao_mx import ops

EXPERTS = 32
KINDS: dict[str, dict[str, Any]] = {
    "plain": dict(alpha=1.0, limit=None, up_offset=0.0),
    "gpt-oss": dict(alpha=1.702, limit=7.0, up_offset=1.0),
}
LAYOUTS = {"halves": False, "pairs": True}
CHECKED_ROWS = 4096  # at once


class Case(NamedTuple):
    kind: str
    layout: str
    bias: torch.Tensor | None
    offs: torch.Tensor | None

    def options(self) -> dict[str, Any]:
        return dict(interleaved=LAYOUTS[self.layout], **KINDS[self.kind])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.swiglu(x, bias=self.bias, offs=self.offs, **self.options())

    def backward(self, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        op = torch.ops.torchao_mx.swiglu_backward
        return op(dy, x, self.bias, self.offs, *self.options().values(), False)[0]


def cases(rows: int, columns: int) -> list[Case]:
    offs = torch.randint(0, rows + 1, (EXPERTS,), device="cuda").sort().values.int()
    offs[-1] = rows
    bias = torch.randn(EXPERTS, 2 * columns, device="cuda", dtype=torch.bfloat16)
    return [
        Case(kind, layout, *((bias, offs) if kind == "gpt-oss" else (None, None)))
        for kind in KINDS
        for layout in LAYOUTS
    ]


def formula(
    x: torch.Tensor, interleaved: bool, alpha: float, limit: float | None, up_offset: float
) -> torch.Tensor:
    gate, up = (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, 1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + up_offset) * gate * torch.sigmoid(alpha * gate)


def check(case: Case, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Both directions against torch's autograd in fp32."""
    y, dx = case.forward(x), case.backward(dy, x)
    for part in torch.arange(len(x), device="cuda").split(CHECKED_ROWS):
        leaf = x[part].float().requires_grad_()
        biased = leaf
        if case.bias is not None:
            biased = leaf + case.bias[torch.searchsorted(case.offs, part.int(), right=True)]
        want = formula(biased, **case.options())
        (want_dx,) = torch.autograd.grad(want, leaf, dy[part].float())
        for direction, got, wanted in (("forward", y, want), ("backward", dx, want_dx)):
            ok = torch.allclose(got[part].float(), wanted, rtol=2**-8, atol=1e-4)
            harness.gate(f"{case.kind} {case.layout} {direction}", ok)


def bench_case(
    case: Case, xs: list[torch.Tensor], dys: list[torch.Tensor], copy_gbs: float
) -> list[harness.Row]:
    first_s = harness.first_call_s(lambda: check(case, xs[0], dys[0]))
    variants: list[tuple[str, int, Callable[[int], Any]]] = [
        ("forward", xs[0].nbytes + dys[0].nbytes, lambda i: case.forward(xs[i])),
        ("backward", 2 * xs[0].nbytes + dys[0].nbytes, lambda i: case.backward(dys[i], xs[i])),
    ]
    rows = []
    for direction, nbytes, fn in variants:
        ms = harness.graph_ms(fn, len(xs))
        eager = harness.step_ms(lambda fn=fn: fn(0))
        rows.append(
            dict(
                rows=len(xs[0]), kind=case.kind, layout=case.layout, direction=direction, ms=ms,
                eager_ms=eager, **harness.moved(nbytes, ms, copy_gbs), first_check_s=first_s,
            )
        )  # fmt: skip
        print(
            f"{case.kind:8s} {case.layout:7s} {direction:9s} {ms:.4f} ms {rows[-1]['share']:6.1%}"
        )
    return rows


def bench_torch(
    case: Case, x: torch.Tensor, dy: torch.Tensor, copy_gbs: float
) -> list[harness.Row]:
    """The formula in torch's own operations, without experts, eager and compiled."""
    rows = []
    leaf = x.detach().requires_grad_()
    for how, call in (("eager", formula), ("compiled", torch.compile(formula, dynamic=False))):
        first_s = harness.first_call_s(lambda call=call: call(leaf, **case.options()))
        y = call(leaf, **case.options())
        for direction, nbytes, fn in (
            ("forward", x.nbytes + dy.nbytes, lambda call=call: call(leaf, **case.options())),
            ("backward", 2 * x.nbytes + dy.nbytes,
             lambda y=y: torch.autograd.grad(y, leaf, dy, retain_graph=True)),
        ):  # fmt: skip
            ms = harness.step_ms(fn)
            rows.append(
                dict(rows=len(x), kind=f"torch, {how}", layout=case.layout, direction=direction, ms=ms,
                     eager_ms=ms, **harness.moved(nbytes, ms, copy_gbs), first_check_s=first_s,)
            )  # fmt: skip
            print(
                f"torch, {how:9s} {case.layout:7s} {direction:9s} {ms:.4f} ms {rows[-1]['share']:6.1%}"
            )
    return rows


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    sizes = sorted({r["rows"] for r in rows})
    figure, axes = plt.subplots(1, len(sizes), figsize=(6.5 * len(sizes), 5), squeeze=False)
    for ax, size in zip(axes[0], sizes, strict=True):
        mine = [r for r in rows if r["rows"] == size]
        labels = [f"{r['kind']}, {r['layout']}, {r['direction']}" for r in mine]
        ours = ["#c44e52" if r["kind"].startswith("torch") else "#4c72b0" for r in mine]
        ax.barh(labels, [100 * r["share"] for r in mine], color=ours)
        ax.axvline(80, color="black", lw=0.8, ls="--")
        ax.set_title(f"{size} rows")
        ax.set_xlim(0, 100)
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=7)
        ax.set_xlabel("% of copy bandwidth")
    harness.save_figure(figure, path, title)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--columns", type=int, default=2880, help="of y; x has twice as many")
    parser.add_argument("--no-torch", action="store_true", help="skip torch's own operations")
    args = parser.parse_args()
    harness.require_gpu()
    torch.manual_seed(0)
    rows, copies = [], {}
    for n_rows in args.rows:
        shape = (n_rows, 2 * args.columns)
        copy_gbs = copies[n_rows] = harness.copy_bandwidth(shape)
        print(f"{torch.cuda.get_device_name()}: bf16 copy of {shape} at {copy_gbs:.0f} GB/s")
        xs = [3 * torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        dys = [torch.randn_like(x[:, : args.columns]).contiguous() for x in xs]
        for case in cases(n_rows, args.columns):
            rows += bench_case(case, xs, dys, copy_gbs)
            if case.kind == "plain" and not args.no_torch:
                rows += bench_torch(case, xs[0], dys[0], copy_gbs)
    meta = dict(columns=args.columns, experts=EXPERTS, dtype="bfloat16", copy_gbs=copies)
    png = harness.save("swiglu", meta, rows)
    plot(rows, png, f"{torch.cuda.get_device_name()}, C = {args.columns}, bf16")
    columns = dict(rows="rows", kind="form", layout="layout", direction="direction", ms="ms (graph)",
                   eager_ms="ms (eager)", gbs="GB/s", share="of copy")  # fmt: skip
    print(harness.markdown(rows, columns))


if __name__ == "__main__":
    main()
