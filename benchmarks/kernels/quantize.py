"""quantize, dequantize, fake_quantize and quantize_with_values: share of the card's copy bandwidth.

    python -m benchmarks.kernels.quantize [--rows 8192 --columns 8192] [--no-torchao]

Bytes are counted once per input and output. Each op is first compared, whole and bit for bit, with torchao's
quantizer and dequantizer on the same data.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from benchmarks.shared import harness
from torchao_mx import MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4, BlockFormat, ScaleCalculationMode, ops

FORMATS = (MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4)


def torchao_quantize(
    x: torch.Tensor, fmt: BlockFormat, pts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if fmt is NVFP4:
        t = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=pts)
        return t.qdata, t.scale
    scale, qdata = to_mx(x, fmt.elem_dtype, fmt.block_size, ScaleCalculationMode.RCEIL)
    return qdata, scale


def torchao_dequantize(
    qdata: torch.Tensor, scale: torch.Tensor, fmt: BlockFormat, pts: torch.Tensor | None
) -> torch.Tensor:
    if fmt is NVFP4:
        return NVFP4Tensor(qdata, scale, 16, torch.bfloat16, pts).dequantize(torch.bfloat16)
    return to_dtype(qdata, scale, fmt.elem_dtype, fmt.block_size, torch.bfloat16)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(x: torch.Tensor, fmt: BlockFormat, pts: torch.Tensor | None) -> None:
    """Every op, both directions, against torchao."""
    for axis in (-1, -2):
        turned = x if axis == -1 else x.t().contiguous()
        want = torchao_quantize(turned, fmt, pts)
        got = ops.quantize(x, fmt, axis=axis, per_tensor_scale=pts)
        harness.gate(f"{fmt} quantize axis={axis}", all(map(same_bytes, got, want)))
        values = torchao_dequantize(*want, fmt, pts)
        values = values if axis == -1 else values.t().contiguous()
        back = ops.dequantize(*got, fmt, axis=axis, per_tensor_scale=pts)
        harness.gate(f"{fmt} dequantize axis={axis}", same_bytes(back, values))
        fake = ops.fake_quantize(x, fmt, axis=axis, per_tensor_scale=pts)
        harness.gate(f"{fmt} fake_quantize axis={axis}", same_bytes(fake, values))
    qdata, scale, values = ops.quantize_with_values(x, fmt, per_tensor_scale=pts)
    want = torchao_quantize(x, fmt, pts)
    ok = same_bytes(qdata, want[0]) and same_bytes(scale, want[1])
    ok = ok and same_bytes(values, torchao_dequantize(*want, fmt, pts))
    harness.gate(f"{fmt} quantize_with_values", ok)


def bench_format(xs: list[torch.Tensor], fmt: BlockFormat, copy_gbs: float) -> list[harness.Row]:
    pts = ops.per_tensor_scale(xs[0], fmt) if fmt.has_per_tensor_scale else None
    first_s = harness.first_call_s(lambda: check(xs[0], fmt, pts))
    hp = xs[0].nbytes
    packed = int(xs[0].numel() * fmt.bits_per_element / 8)
    quantized = [ops.quantize(x, fmt, per_tensor_scale=pts) for x in xs]
    kw: dict[str, Any] = {"per_tensor_scale": pts}
    variants: list[tuple[str, str, int, Callable[[int], Any]]] = []
    for axis, direction in ((-1, "rows"), (-2, "columns")):
        variants += [
            ("quantize", direction, hp + packed,
             lambda i, axis=axis: ops.quantize(xs[i], fmt, axis=axis, **kw)),
            ("dequantize", direction, hp + packed,
             lambda i, axis=axis: ops.dequantize(*quantized[i], fmt, axis=axis, **kw)),
            ("fake_quantize", direction, 2 * hp,
             lambda i, axis=axis: ops.fake_quantize(xs[i], fmt, axis=axis, **kw)),
        ]  # fmt: skip
    variants.append(
        ("quantize_with_values", "rows", 2 * hp + packed,
         lambda i: ops.quantize_with_values(xs[i], fmt, **kw))
    )  # fmt: skip
    rows = []
    for op, direction, nbytes, fn in variants:
        ms = harness.graph_ms(fn, len(xs))
        eager = harness.step_ms(lambda fn=fn: fn(0))
        rows.append(
            dict(
                format=fmt.name, op=op, direction=direction, ms=ms, eager_ms=eager,
                **harness.moved(nbytes, ms, copy_gbs), first_check_s=first_s,
            )
        )  # fmt: skip
        print(f"{fmt.name:11s} {op:21s} {direction:8s} {ms:.4f} ms {rows[-1]['share']:6.1%}")
    return rows


def bench_torchao(xs: list[torch.Tensor], fmt: BlockFormat, copy_gbs: float) -> list[harness.Row]:
    """torchao's own quantizer and dequantizer, eager and compiled."""
    pts = ops.per_tensor_scale(xs[0], fmt) if fmt.has_per_tensor_scale else None
    nbytes = xs[0].nbytes + int(xs[0].numel() * fmt.bits_per_element / 8)
    quantized = torchao_quantize(xs[0], fmt, pts)
    rows = []
    for name, fn in (
        ("quantize", lambda x: torchao_quantize(x, fmt, pts)),
        ("dequantize", lambda _x: torchao_dequantize(*quantized, fmt, pts)),
    ):
        for how, call in (("eager", fn), ("compiled", torch.compile(fn, dynamic=False))):
            first_s = harness.first_call_s(lambda call=call: call(xs[0]))
            ms = harness.step_ms(lambda call=call: call(xs[0]))
            rows.append(
                dict(format=fmt.name, op=f"torchao {name}, {how}", direction="rows", ms=ms,
                     eager_ms=ms, **harness.moved(nbytes, ms, copy_gbs), first_check_s=first_s,)
            )  # fmt: skip
            print(f"{fmt.name:11s} {rows[-1]['op']:30s} {ms:.4f} ms {rows[-1]['share']:6.1%}")
    return rows


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    figure, axes = plt.subplots(1, len(FORMATS), figsize=(16, 4.2), sharex=True)
    for ax, fmt in zip(axes, FORMATS, strict=True):
        mine = [r for r in rows if r["format"] == fmt.name]
        labels = [f"{r['op']}\n({r['direction']})" for r in mine]
        ours = ["#c44e52" if r["op"].startswith("torchao") else "#4c72b0" for r in mine]
        ax.barh(labels, [100 * r["share"] for r in mine], color=ours)
        ax.axvline(85, color="black", lw=0.8, ls="--")
        ax.set_title(fmt.name)
        ax.set_xlim(0, 100)
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=7)
        ax.set_xlabel("% of copy bandwidth")
    harness.save_figure(figure, path, title)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--no-torchao", action="store_true", help="skip torchao's own kernels")
    args = parser.parse_args()
    harness.require_gpu()
    shape = (args.rows, args.columns)
    torch.manual_seed(0)
    copy_gbs = harness.copy_bandwidth(shape)
    print(f"{torch.cuda.get_device_name()}: bf16 copy of {shape} at {copy_gbs:.0f} GB/s")
    xs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    rows = [row for fmt in FORMATS for row in bench_format(xs, fmt, copy_gbs)]
    if not args.no_torchao:
        for fmt in (MXFP4, MXFP8_E4M3):
            rows += bench_torchao(xs, fmt, copy_gbs)
    meta = dict(shape=list(shape), dtype="bfloat16", copy_gbs=copy_gbs)
    png = harness.save("quantize", meta, rows)
    plot(rows, png, f"{torch.cuda.get_device_name()}, {args.rows} x {args.columns} bf16")
    columns = dict(format="format", op="op", direction="blocks along", ms="ms (graph)",
                   eager_ms="ms (eager)", gbs="GB/s", share="of copy")  # fmt: skip
    print(harness.markdown(rows, columns))


if __name__ == "__main__":
    main()
