"""The tables of README.md and benchmarks/README.md, from the JSON in results/; no GPU is needed.

    python -m benchmarks.shared.report            rewrites them
    python -m benchmarks.shared.report --check    exits with 1 if a document says anything else

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; its function is in ``TABLES``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.shared import results
from benchmarks.shared.results import ROOT, Row

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SHAPES = {
    "A": "128 of 2048 → 1024, top 8",
    "B": "32 of 2880 → 5760, top 4",
    "deepseek": "256 of 7168 → 4096, top 8",
}
WAYS = ("forward", "backward")
COUNTS = {"kb": "KB", "mflop": "MFLOP", "decoded_k": "thousand weights decoded"}
VARIANTS = ("bf16 weights (baseline)", "bf16", "fp8", "fp8, dX too")


def rows_of(name: str, gpu: str = "h200") -> list[Row]:
    return results.read(name, gpu)["rows"]


def values(rows: Iterable[Row], key: str) -> list[Any]:
    """The distinct ones, as they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def find(found: Iterable[Row], /, **fields: Any) -> Row | None:
    return next((r for r in found if all(r[k] == v for k, v in fields.items())), None)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """Markdown; the columns from ``numbers_from`` on to the right."""
    rules = ["---" if i < numbers_from else "---:" for i in range(len(heads))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, rules, *lines])


def number(value: float | None, digits: int = 2) -> str:
    """Three figures at least: 0.31, 17.4, 1,302."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{min(digits, 1) if abs(value) >= 10 else digits}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def by_product(shape: str) -> str:
    return shape.replace("x", "×")


# --- kernels --------------------------------------------------------------------------------------


def quantize() -> str:
    rows = rows_of("quantize")
    names = {name: name.upper().replace("_", " ") for name in values(rows, "format")}
    lines = []
    for op, direction in dict.fromkeys((r["op"], r["direction"]) for r in rows):
        found = [find(rows, op=op, direction=direction, format=fmt) for fmt in names]
        blocks = ", 32 × 1 blocks" if direction == "columns" else ""
        lines.append([op + blocks, *(percent(r and r["share"]) for r in found)])
    return table(["share of copy bandwidth", *names.values()], lines)


def quantize_both() -> str:
    lines = [
        [r["case"], number(r["ms"], 3), number(r["separate_ms"], 3), percent(r["share"])]
        for r in rows_of("quantize_both")
    ]
    return table(["operand and its forms", "ms", "a launch each, ms", "of copy bandwidth"], lines)


def swiglu() -> str:
    rows = [r for r in rows_of("swiglu") if r["rows"] == 65536]
    layouts = {"halves": "gate and up in halves", "pairs": "interleaved"}
    lines = []
    for kind in values(rows, "kind"):
        found = [
            find(rows, kind=kind, layout=layout, direction=way)
            for layout in layouts
            for way in ("forward", "backward")
        ]
        lines.append([kind, *(percent(r and r["share"]) for r in found)])
    heads = [f"{name}: {way}" for name in layouts.values() for way in ("forward", "backward")]
    return table(["share of copy bandwidth", *heads], lines)


# --- a linear layer -------------------------------------------------------------------------------


def _linear(rows: list[Row]) -> str:
    lines = [
        [
            by_product(r["shape"]), r["layer"], number(r["ms"], 3), number(r["ratio"], 3),
            number(r["graph_ms"], 3), number(r["graph_ratio"], 3), number(r["peak_mb"], 0),
        ]
        for r in rows
    ]  # fmt: skip
    heads = [
        "M × K × N", "layer", "eager, ms", "ratio to bf16", "in a CUDA graph, ms", "its ratio",
        "peak over the model, MB",
    ]  # fmt: skip
    return table(heads, lines, numbers_from=2)


def qat_linear() -> str:
    return _linear(rows_of("qat_linear"))


def qat_linear_headline() -> str:
    rows = rows_of("qat_linear")
    return _linear([r for r in rows if r["shape"] == rows[0]["shape"]])


def recipe_linear() -> str:
    return _linear(rows_of("recipe_linear"))


# --- training -------------------------------------------------------------------------------------


def train_recipes() -> str:
    lines = [
        [
            r["arm"], number(r["final"], 4), number(r["ratio"], 4), number(r["final_nvfp4"], 4),
            number(r["step_ms"], 1),
        ]
        for r in rows_of("train_recipes")
    ]  # fmt: skip
    heads = ["trained in", "held-out loss", "ratio to bf16", "held-out loss in NVFP4", "ms a step"]
    return table(heads, lines)


def quality() -> str:
    found = results.read("quality")
    formats = {"mxfp4-weight-only": "MXFP4 weights", "w4a8": "W4A8", "mxfp4": "W4A4"}

    def gap(row: Row) -> str:
        return f"+{row['gap']:.4f} ± {row['gap_std']:.4f}"

    lines = []
    for verdict in found["meta"]["verdicts"]:
        model, fmt = verdict["model"], verdict["format"]
        arms = [r for r in found["rows"] if r["model"] == model]
        base = find(arms, format=None)
        ptq, qat = (r for r in arms if r["format"] == fmt)
        gains = [a - b for a, b in zip(ptq["losses"], qat["losses"], strict=True)]
        lines.append(
            [
                f"{model}, {found['meta']['models'][model]['parameters'] / 1e6:.0f} M", formats[fmt],
                f"{base['loss']:.4f} ± {base['loss_std']:.4f}", gap(ptq), gap(qat),
                f"{1 - qat['gap'] / ptq['gap']:.0%}", f"{min(gains):+.4f}",
                "yes" if verdict["holds"] else "**no**",
            ]
        )  # fmt: skip
    heads = [
        "model", "format", "(0) bf16", "(1) PTQ over it", "(2) QAT over it", "recovered",
        "(1) - (2), the least of the seeds", "(0) ≥ (2) > (1) in every seed",
    ]  # fmt: skip
    return table(heads, lines, numbers_from=2)


def compiled_blocks() -> str:
    models = {"llama": "Llama-3-8B", "gpt_oss": "gpt-oss-20b"}
    rows, lines = rows_of("compile"), []
    for case in values(rows, "case"):
        eager, plain, reduced = (
            find(rows, case=case, mode=mode) for mode in ("eager", "compiled", "reduce-overhead")
        )
        config, model = case.split(", ")
        cells = [models[model], config, number(eager["ms"])]
        for r in (plain, reduced):
            cells += [number(r["ms"]), number(r["ratio"])]
        lines.append([*cells, number(plain["limit"]), number(plain["first_s"], 1)])
    heads = [
        "block of", "", "eager, ms", "compiled, ms", "ratio", "reduce-overhead, ms", "ratio", "limit",
        "first compiled step, s",
    ]  # fmt: skip
    return table(heads, lines, numbers_from=2)


def ladder() -> str:
    lines = [
        [
            r["model"], f"{r['layers']}", number(r["cold_s"], 1), number(r["warm_s"]), number(r["ms"], 1),
            f"{r['tokens_per_s']:,.0f}", number(r["weights_gb"], 1), number(r["peak_gb"], 1),
        ]
        for r in rows_of("ladder")
    ]  # fmt: skip
    heads = [
        "gpt-oss", "layers", "first step, s: Triton's cache empty", "warm", "ms a step", "tokens/s",
        "weights, GB", "peak, GB",
    ]  # fmt: skip
    return table(heads, lines)


def soak() -> str:
    m = results.read("soak")["meta"]
    lines = [
        ["steps, of them poisoned and skipped", f"{m['steps']:,}, {m['skipped']}"],
        ["different numbers of tokens", f"{m['sizes']:,}"],
    ]
    for key, what in (
        ("allocated", "allocated on the GPU"),
        ("reserved", "reserved on the GPU"),
        ("resident", "the process on the host"),
    ):
        first, most = m[f"{key}_mb_first"], m[f"{key}_mb_max"]
        what += ", behind the first step and the most, MB"
        lines.append([what, f"{first:,.0f}, {most:,.0f}"])
    return table(["", "found"], lines)


# --- LoRA -----------------------------------------------------------------------------------------


def _lora_grouped(rows: list[Row], routings: dict[str, str]) -> str:
    lines = []
    for routing, label in routings.items():
        routed = [r for r in rows if r["routing"] == routing]
        for shape, tokens in dict.fromkeys((r["shape"], r["tokens"]) for r in routed):
            base, ours, fp8, fp8_dx = (
                find(routed, shape=shape, tokens=tokens, variant=v) for v in VARIANTS
            )
            lines.append(
                [
                    f"{SHAPES[shape]}{label}: {tokens:,}", number(base["ms"]), number(ours["ms"]),
                    number(ours["ratio"]), f"**{number(ours['graph_ratio'])}**", number(fp8["graph_ratio"]),
                    number(fp8_dx["graph_ratio"]), f"{base['peak_mb']:,.0f}, {ours['peak_mb']:,.0f}",
                ]
            )  # fmt: skip
    heads = [
        "experts, tokens", "bf16 weights, ms", "MXFP4, ms", "ratio", "in a CUDA graph", "fp8 compute, graph",
        "fp8, gradient too, graph", "peak over the weights, MB: bf16, MXFP4",
    ]  # fmt: skip
    return table(heads, lines)


def lora_grouped() -> str:
    routings = {"balanced": "", "dense": ", the same number each", "sparse": ", 10 active"}
    return _lora_grouped(rows_of("lora_grouped"), routings)


def lora_grouped_headline() -> str:
    rows = [r for r in rows_of("lora_grouped") if r["shape"] in ("A", "B")]
    return _lora_grouped(rows, {"balanced": ""})


def lora_missed() -> str:
    """Limits of issue and design that a measurement missed."""
    lines = []
    for r in rows_of("lora_grouped") + rows_of("lora_linear"):
        if "tokens" in r:
            point = f"{r['shape']}, {r['routing']}: {r['tokens']:,}"
        else:
            point = f"a dense layer: {r['rows']:,}"
        for check in r["checks"]:
            if not check["met"]:
                found = [number(check["value"], 3), number(check["limit"], 3)]
                lines.append([point, r["variant"], check["column"].replace("_", " "), *found])
    return table(["point", "compute", "column", "measured", "limit"], lines, numbers_from=3)


def lora_linear() -> str:
    rows, lines = rows_of("lora_linear"), []
    for m in values(rows, "rows"):
        base, ours, fp8, fp8_dx = (find(rows, rows=m, variant=v) for v in VARIANTS)
        lines.append(
            [
                f"{m:,}", number(base["ms"], 3), number(ours["ratio"]), f"**{number(ours['graph_ratio'])}**",
                number(ours["forward_ratio"]), number(fp8["graph_ratio"]), number(fp8_dx["graph_ratio"]),
            ]
        )  # fmt: skip
    heads = [
        "rows", "bf16 weight, ms", "MXFP4, ratio", "in a CUDA graph", "forward alone, graph",
        "fp8 compute, graph", "gradient too, graph",
    ]  # fmt: skip
    return table(heads, lines, numbers_from=0)


def first_step() -> str:
    lines = []
    for r in rows_of("lora_grouped_first_step"):
        shape, routing, tokens, compute = r["point"].split(":")
        name = f"{SHAPES[shape]}, {routing}: {int(tokens):,}, {compute}"
        lines.append([name, number(r["cold_s"]), number(r["warm_s"])])
    return table(["experts, tokens", "Triton's cache empty, s", "with its cache, s"], lines)


def moe_layer() -> str:
    rows = rows_of("moe_layer")
    names = {
        "bf16 grouped_mm + LoRA": "bf16 experts, transformers' `grouped_mm`, adapters in PyTorch",
        "PEFT target_parameters": "bf16 experts, PEFT's `target_parameters`",
        "MXLoRAExperts": "`MXLoRAExperts`",
        "MXLoRAExperts, fp8": "`MXLoRAExperts`, fp8 compute",
        "MXLoRAExperts, fp8, dX too": "`MXLoRAExperts`, fp8, gradient too",
    }
    lines = []
    for variant, name in names.items():
        cells = [name]
        for tokens in values(rows, "tokens"):
            r = find(rows, tokens=tokens, variant=variant)
            cells += [f"{r['ms']:.1f}", number(r["ratio"]), number(r["peak_mb"], 0)]
        lines.append(cells)
    heads = [""]
    for tokens in values(rows, "tokens"):
        heads += [f"{tokens:,} tokens: ms", "ratio", "peak MB"]
    return table(heads, lines)


# --- whole models ---------------------------------------------------------------------------------


def gpt_oss() -> str:
    names = {
        "PEFT on bf16": "PEFT's, on experts in bf16",
        "PEFT on MXTensors": "PEFT's, on experts in MXFP4",
        "MXLoRAExperts": "`MXLoRAExperts` beside PEFT's on attention",
    }
    lines = []
    for file, attention in (("gpt_oss", "eager"), ("gpt_oss_flex_attention", "`flex_attention`")):
        rows = rows_of(file)
        for model in values(rows, "model"):
            for variant, name in names.items():
                r = find(rows, model=model, variant=variant)
                if r is not None:
                    speed = [f"{r['tokens_per_s']:,.0f}", f"{r['peak_gb']:.1f}"]
                    lines.append([model, attention, name, *speed])
    return table(["gpt-oss", "attention", "adapters", "tokens/s", "peak GB"], lines, numbers_from=3)


def distributed() -> str:
    names = {"lora": "`MXLoRAExperts`", "bf16-lora": "bf16 experts, adapters in PyTorch"}
    rows, lines = rows_of("train_distributed"), []
    for r in rows:
        one = find(rows, **{k: r[k] for k in ("model", "method", "attention", "compiled")}, ranks=1)
        efficiency = one and r["tokens_per_s"] / one["tokens_per_s"] / r["ranks"]
        split = f"FSDP2, experts over {r['ep']}" if r["ep"] > 1 else "FSDP2"
        several, gathered = r["ranks"] > 1, f"{r['all_gather_mb'] / 1e3:.1f}"
        lines.append(
            [
                r["model"], names[r["method"]], r["attention"] + ", compiled" * r["compiled"],
                f"{r['ranks']}", split * several, f"{r['ms']:,.0f}", f"{r['tokens_per_s']:,.0f}",
                f"{efficiency:.0%}" if several and one else "", f"{r['peak_gb']:.1f}", gathered * several,
                f"{r['all_to_all_mb'] / 1e3:.1f}" * (r["ep"] > 1),
            ]
        )  # fmt: skip
    heads = [
        "gpt-oss", "experts", "attention", "H200s", "split by", "ms a step", "tokens/s", "scaling",
        "peak GB a GPU", "all-gathered GB a step", "all-to-all GB",
    ]  # fmt: skip
    return table(heads, lines, numbers_from=5)


def fp8_accuracy() -> str:
    lines = [
        [r["x"], r["dtype"], r["product"], percent(r["relative_error"]), percent(r["worst_row"])]
        for r in rows_of("fp8_accuracy", gpu="")
    ]
    heads = ["activations", "rounded to", "product", "relative error", "of the worst row"]
    return table(heads, lines, numbers_from=3)


def cost_model() -> str:
    lines = [
        [
            r["point"], r["column"], r["use"], number(r["predicted_ms"]), number(r["measured_ms"]),
            f"{r['error']:+.0%}",
        ]
        for r in rows_of("cost_model", gpu="")
        if "measured_ms" in r
    ]  # fmt: skip
    return table(["point", "time", "", "model, ms", "measured, ms", "error"], lines, numbers_from=3)


def cost_work() -> str:
    lines = [
        [r["model"], r["part"], *(number(r[f"{way}_{key}"]) for way in WAYS for key in COUNTS)]
        for r in results.read("cost_model", gpu="")["work"]
    ]
    heads = [f"{way}: {what}" for way in WAYS for what in COUNTS.values()]
    return table(["gpt-oss", "part", *heads], lines, numbers_from=2)


def cost_verdict() -> str:
    found = results.read("cost_model", gpu="")
    meta, predicted = found["meta"], [r for r in found["rows"] if r["use"] == "predicted"]
    worst = max(predicted, key=lambda r: abs(r["error"]))
    line = [f"{meta['close']} of {meta['predicted']}"]
    line.append(f"{worst['error']:+.0%}: {worst['point']}, {worst['column']}")
    return table(["predicted within 20 %", "the largest error"], [line])


def cost_scaling() -> str:
    lines = [
        [
            r["model"], f"{r['gpus']:,}", r["plan"], number(r["weights_gb"], 1), number(r["ms"], 0),
            f"{r['tokens_per_s']:,.0f}", r["efficiency"],
        ]
        for r in results.read("cost_model", gpu="")["scaling"]
        if r["gpus"] in (1, 8, 1000)
    ]  # fmt: skip
    heads = ["gpt-oss", "GPUs", "plan", "weights a GPU, GB", "ms a step", "tokens/s", "efficiency"]
    return table(heads, lines, numbers_from=3)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        quantize, quantize_both, swiglu, qat_linear, qat_linear_headline, recipe_linear, train_recipes,
        quality, compiled_blocks, ladder, soak, lora_grouped, lora_grouped_headline, lora_missed,
        lora_linear, first_step, moe_layer, gpt_oss, distributed, fp8_accuracy, cost_model,
        cost_work, cost_verdict, cost_scaling,
    )
}  # fmt: skip


def rendered(text: str) -> str:
    """``text`` with its tables as the results have them.

    Raises:
        KeyError: a marker names no table.
    """
    return MARKED.sub(lambda m: m[1] + "\n" + TABLES[m[2]]() + "\n" + m[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for path in DOCUMENTS:
        text = path.read_text()
        fresh = rendered(text)
        if args.check and fresh != text:
            raise SystemExit(
                f"{path.name} is not what results/ says: run python -m benchmarks.shared.report"
            )
        if fresh != text:
            path.write_text(fresh)


if __name__ == "__main__":
    main()
