"""LoRA on packed experts from one layer to the whole model: the first step, a step, memory.

    pip install '.[hf,bench]'
    python -m benchmarks.models.ladder [--rungs 20b:1 20b:24 120b:36 ...] [--sequence 1024]
    python -m benchmarks.models.ladder --tiny --device cpu

A rung is a gpt-oss shape and a number of its layers, trained as in gpt_oss.py: MXLoRAExperts, PEFT's
adapters on attention, checkpointing, the loss in chunks, AdamW. Each is a process of its own, with the Triton
cache that the processes before it left (warm); the first rung of a shape is run once before that, with an
empty one (cold). CUDA's libraries are loaded before a first step. Adapters' gradients and a loss that falls
are checked before any figure is printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

import torch

from benchmarks.models import gpt_oss
from benchmarks.models.gpt_oss import MODELS, OURS, WARMUP
from benchmarks.shared import harness

RUNGS = ("20b:1", "20b:2", "20b:4", "20b:8", "20b:24", "120b:1", "120b:36")
TINY_RUNGS = ("tiny:1", "tiny:2")
STEPS = 5
COLUMNS = dict(
    model="shape", layers="layers", tokens="tokens", cold_s="first step s, cold", warm_s="warm",
    ms="ms a step", ms_a_layer="ms a layer more", tokens_per_s="tok/s", weights_gb="weights GB",
    peak_gb="peak GB",
)  # fmt: skip


def climb(size: str, layers: int, sequence: int, device: str) -> harness.Row:
    """One rung, in this process."""
    MODELS["rung"] = MODELS[size] | dict(num_hidden_layers=layers)
    torch.manual_seed(0)
    model = gpt_oss.with_adapters(gpt_oss.build("rung", True, "eager", device), OURS)
    vocabulary = model.get_base_model().config.vocab_size
    ids = torch.randint(vocabulary, (1, sequence), device=device)
    step = gpt_oss.trainer(model, ids, whole=False)
    square = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
    square @ square  # loads libraries
    weights_gb = torch.cuda.memory_allocated() / 1e9 if device == "cuda" else None
    clock = harness.Clock(device)
    losses = [step()]
    first_s = clock.ms() / 1e3
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARMUP + STEPS):
        clock = harness.Clock(device)
        losses.append(step())
        times.append(clock.ms())
    peak = harness.peak_gb(device)
    gpt_oss.check(model, ids, False, f"{size}, {layers} layers")
    losses = [loss.item() for loss in losses]
    harness.gate(f"{size}, {layers} layers: losses {losses}", losses[-1] < losses[0])
    return dict(
        first_s=first_s, ms=statistics.median(times[WARMUP:]), weights_gb=weights_gb, peak_gb=peak
    )


def climb_all(rungs: list[str], sequence: int, device: str) -> list[harness.Row]:
    """A row a rung, each with the cache of its shape.

    Raises:
        SystemExit: a process failed; its own message is above.
    """
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for rung in rungs:
            size, layers = rung.split(":")
            cache = pathlib.Path(folder) / size
            point = f"{rung}:{sequence}:{device}"
            try:
                cold = None
                if not cache.exists():
                    cache.mkdir()
                    cold = harness.fresh_process(__file__, point, str(cache))["first_s"]
                found = harness.fresh_process(__file__, point, str(cache))
            except subprocess.SubprocessError as error:
                raise SystemExit(f"{rung}: {error}") from None
            row = dict(model=size, layers=int(layers), tokens=sequence, cold_s=cold)
            row |= dict(warm_s=found.pop("first_s"), **found)
            row |= dict(ms_a_layer=None, tokens_per_s=sequence / row["ms"] * 1e3)
            below = rows[-1] if rows and rows[-1]["model"] == size else None
            if below is not None and below["layers"] < row["layers"]:
                row["ms_a_layer"] = (row["ms"] - below["ms"]) / (row["layers"] - below["layers"])
            rows.append(row)
            print(
                f"{rung}: {row['warm_s']:.2f} s, then {row['ms']:.1f} ms, {row['peak_gb']:.1f} GB",
                flush=True,
            )
    return rows


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    panels = dict(warm_s="first step, warm, s", ms="a step, ms", peak_gb="peak memory, GB")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8))
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        for size in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == size]
            line = [row["layers"] for row in mine], [row[column] for row in mine]
            ax.plot(*line, marker="o", label=f"gpt-oss {size}")
        ax.set(xlabel="layers", ylabel=label, xlim=(0, None), ylim=(0, None))
        ax.grid(alpha=0.25)
    axes[0].legend()
    harness.save_figure(figure, path, title)


def parse() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--rungs", nargs="+", metavar="SHAPE:LAYERS", help=f"default {RUNGS}")
    parser.add_argument("--sequence", type=int, help="tokens of a step; default 1024, of tiny 64")
    parser.add_argument("--tiny", action="store_true", help=f"the rungs {TINY_RUNGS}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--first-step-of", metavar="RUNG", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rungs = args.rungs or list(TINY_RUNGS if args.tiny else RUNGS)
    args.sequence = args.sequence or (64 if args.tiny else 1024)
    for rung in args.rungs:
        size, _, layers = rung.partition(":")
        if size not in MODELS or not layers.isdigit() or not int(layers):
            parser.error(f"--rungs {rung}: it takes SHAPE:LAYERS, a shape of {', '.join(MODELS)}")
    return args


def main() -> None:
    args = parse()
    if args.first_step_of:
        size, layers, sequence, device = args.first_step_of.split(":")
        print(json.dumps(climb(size, int(layers), int(sequence), device)))
        return
    if args.device == "cuda":
        harness.require_gpu()
    rows = climb_all(args.rungs, args.sequence, args.device)
    if args.device == "cuda" and not args.tiny:
        png = harness.save("ladder", dict(sequence=args.sequence), rows)
        title = (
            f"{torch.cuda.get_device_name()}: LoRA on packed experts, {args.sequence} tokens a step"
        )
        plot(rows, png, title)
    print(harness.markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
