"""Pretraining from scratch under each recipe: the same model, seed and batches, curves and final losses.

    python -m benchmarks.quality.train_recipes [--minutes 9] [--steps N] [--arm NAME ...] [--data FOLDER]
    python -m benchmarks.quality.train_recipes --tiny    # on a CPU, in a minute; no result

The demo's transformer at 127 M parameters, bf16 weights with fp32 masters, on the text of the installed
Python packages. Embedding and head stay in bf16. On a GPU a step's forward and backward are CUDA graphs, so
that its milliseconds are the kernels' and not the host's. ``--minutes`` ends a run between two steps and
keeps a checkpoint; the same command goes on from there. Arms that are complete are not trained again.

For each arm, beside the held-out loss of what was trained: that of the model with its weights and activations
in NVFP4, which for the arms with an NVFP4 forward pass must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from benchmarks.quality.train_loop import MasterAdam, learning_rate
from benchmarks.shared import harness
from torchao_mx import (
    MXFP8_E4M3,
    MXDynamicActivationMXWeightConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    NVFP4MXFP8Linear,
    QuantizeSpec,
)
from torchao_mx.demo.data import Corpus, load_corpus
from torchao_mx.demo.model import build_model, heldout_losses, token_losses
from torchao_mx.demo.quant import is_quantized_linear
from torchao_mx.demo.settings import Settings

FULL = Settings(
    layers=10, dim=1024, heads=16, seq=1024, batch=32, device="cuda",
    data=sysconfig.get_path("purelib"), eval_windows=128, eval_every=100, lr=6e-4, steps=3500,
)  # fmt: skip
TINY = replace(
    FULL, layers=1, dim=64, heads=2, seq=64, batch=4, device="cpu", data=None, eval_windows=16,
    eval_every=5, lr=4e-3, steps=20,
)  # fmt: skip
BATCHES = "pretrain"  # the part of the corpus
LAST = 50  # steps whose mean is the final training loss
POINTS = 350  # of a training curve, each a mean over as many steps
SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class MXFP8BothWaysConfig(NVFP4ForwardMXFP8BackwardConfig):
    """The recipe with MXFP8 in forward too, for comparison."""

    @property
    def forward_spec(self) -> QuantizeSpec:
        return QuantizeSpec(MXFP8_E4M3, self.scaling_mode)


@register_quantize_module_handler(MXFP8BothWaysConfig)
def _mxfp8_handler(module: nn.Module, config: MXFP8BothWaysConfig) -> nn.Module:
    return NVFP4MXFP8Linear.from_linear(module, config)


E2M1 = torch.float4_e2m1fn_x2
NVFP4_PTQ = MXDynamicActivationMXWeightConfig(E2M1, E2M1, block_size=16)


@dataclass(frozen=True)
class Arm:
    """A way to train: its config, None for bf16, and whether its forward pass is that of the NVFP4 model."""

    what: str
    config: AOBaseConfig | None
    is_nvfp4: bool = False


ARMS = {
    "bf16": Arm("bf16", None),
    "recipe": Arm("NVFP4 forward, MXFP8 backward", NVFP4ForwardMXFP8BackwardConfig(), True),
    "recipe-stochastic": Arm(
        "the same, dY rounded stochastically",
        NVFP4ForwardMXFP8BackwardConfig(stochastic_rounding=True), True,
    ),
    "nvfp4-qat": Arm("NVFP4 QAT, bf16 backward", QATConfig(NVFP4_PTQ, step="prepare"), True),
    "mxfp8": Arm("MXFP8 both ways", MXFP8BothWaysConfig()),
}  # fmt: skip


class Stopped(Exception):
    """The time is over; a checkpoint is there."""


def in_nvfp4(model: nn.Module, arm: Arm) -> nn.Module:
    """The trained model with its linears in NVFP4, in place."""
    if arm.is_nvfp4:
        quantize_(model, QATConfig(NVFP4_PTQ, step="convert"), filter_fn=is_quantized_linear)
        return model
    if arm.config is not None:
        quantize_(model, QATConfig(step="convert"), filter_fn=is_quantized_linear)
    quantize_(model, NVFP4_PTQ, filter_fn=is_quantized_linear)
    return model


def train(
    name: str, settings: Settings, corpus: Corpus, state: pathlib.Path, deadline: harness.Deadline
) -> dict[str, Any]:
    """The results of an arm, trained to its end; from its checkpoint if there is one."""
    arm, checkpoint = ARMS[name], state / f"{name}.pt"
    model = build_model(settings).bfloat16()
    if arm.config is not None:
        quantize_(model, arm.config, filter_fn=is_quantized_linear)
    optimizer = MasterAdam(model)
    heldout = corpus.heldout_windows(settings.eval_windows, settings.seq).to(settings.device)
    measure = functools.partial(heldout_losses, windows=heldout, batch=settings.batch)
    record: dict[str, Any] = {"step": 0, "seconds": 0.0, "train": [], "heldout": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=settings.device, weights_only=True)
        if saved["settings"] != asdict(settings) or saved["digest"] != corpus.digest:
            raise SystemExit(
                f"{checkpoint} is of other settings or text; remove it, or take another --state"
            )
        optimizer.load_state_dict(saved["optimizer"])  # and the weights, which it has in fp32
        record = saved["record"]
        print(f"{arm.what}: from step {record['step']}")

    def save() -> None:
        torch.save(
            {
                "settings": asdict(settings),
                "digest": corpus.digest,
                "optimizer": optimizer.state_dict(),
                "record": record,
            },
            checkpoint,
        )

    if settings.device == "cuda":
        record_graphs(arm, model, settings)
    _steps(arm, model, optimizer, corpus, settings, record, measure, save, deadline)
    own = measure(model)
    served = measure(in_nvfp4(model, arm))
    if arm.is_nvfp4:
        harness.gate(f"{arm.what}: converted", torch.equal(own, served))
    return record | {"final": own.mean().item(), "final_nvfp4": served.mean().item()}


def record_graphs(arm: Arm, model: nn.Module, settings: Settings) -> None:
    """Have the model train from CUDA graphs of its forward and backward, evaluated as it is.

    Raises:
        harness.WrongResult: the graph's loss is not the model's.
    """
    vocabulary, shape = model.head.out_features, (settings.batch, settings.seq + 1)
    windows = torch.randint(vocabulary, shape, device=settings.device)
    with torch.no_grad():
        want = token_losses(model, windows).mean().item()
    torch.cuda.make_graphed_callables(model, (windows[:, :-1],))
    got = token_losses(model, windows.roll(1, 0)).mean().item()  # other values than recorded
    # cuBLAS may choose other kernels for a capture's workspace.
    harness.gate(
        f"{arm.what}: graph: loss {got}, not {want}", math.isclose(got, want, rel_tol=1e-3)
    )


def _steps(
    arm: Arm,
    model: nn.Module,
    optimizer: MasterAdam,
    corpus: Corpus,
    settings: Settings,
    record: dict[str, Any],
    measure: Callable[[nn.Module], torch.Tensor],
    save: Callable[[], None],
    deadline: harness.Deadline,
) -> None:
    losses: list[torch.Tensor] = []
    start, saved = time.monotonic(), time.monotonic()

    def settle() -> None:
        """Bring the losses to the host, and the time up to date."""
        nonlocal start
        record["train"] += torch.stack(losses).tolist() if losses else []
        losses.clear()
        record["seconds"] += time.monotonic() - start
        start = time.monotonic()

    while record["step"] < settings.steps:
        step = record["step"]
        if step % settings.eval_every == 0:
            settle()
            loss = measure(model).mean().item()
            if not record["heldout"] or record["heldout"][-1][0] != step:
                record["heldout"].append([step, loss])
            print(f"{arm.what}: step {step} of {settings.steps}, held-out {loss:.4f}", flush=True)
            start = time.monotonic()  # measuring is no part of the time
        # Stochastic rounding draws from this; by the step, so that a resumed run draws the same.
        torch.manual_seed(settings.seed + step)
        tokens = corpus.batch(BATCHES, step, settings.seed, settings.batch, settings.seq)
        loss = token_losses(model, tokens.to(settings.device)).mean()
        loss.backward()
        optimizer.step(learning_rate(step, settings.steps, settings.lr, settings.lr / 10))
        losses.append(loss.detach())
        record["step"] += 1
        if deadline or time.monotonic() - saved > SAVE_EVERY_S:
            settle()
            save()
            saved = start = time.monotonic()
        if deadline:
            raise Stopped(f"{arm.what}: stopped at step {record['step']} of {settings.steps}")
    settle()
    record["heldout"].append([settings.steps, measure(model).mean().item()])


def rows_of(results: dict[str, dict[str, Any]], settings: Settings) -> list[harness.Row]:
    base = results["bf16"]["final"] if "bf16" in results else None
    rows = []
    for name, record in results.items():
        last = record["train"][-LAST:]
        rows.append(
            dict(
                arm=ARMS[name].what, final=record["final"],
                ratio=None if base is None else record["final"] / base,
                train=sum(last) / len(last), final_nvfp4=record["final_nvfp4"],
                step_ms=1e3 * record["seconds"] / settings.steps, minutes=record["seconds"] / 60,
                heldout=record["heldout"], losses=_curve(record["train"]),
            )
        )  # fmt: skip
    return rows


def _curve(losses: list[float]) -> list[float]:
    every = max(1, len(losses) // POINTS)
    chunks = (losses[i : i + every] for i in range(0, len(losses), every))
    return [round(sum(chunk) / len(chunk), 5) for chunk in chunks]


def plot(rows: list[harness.Row], path: pathlib.Path, title: str) -> None:
    plt = harness.pyplot()

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    base = dict(rows[0]["heldout"])
    for row in rows:
        steps, losses = zip(*row["heldout"], strict=True)
        left.plot(steps, losses, label=row["arm"])
        if row is not rows[0]:
            right.plot(
                steps, [100 * (y / base[s] - 1) for s, y in row["heldout"]], label=row["arm"]
            )
    left.set_ylabel("held-out loss, nats a byte")
    left.set_yscale("log")
    right.set_ylabel(f"over {rows[0]['arm']}'s, %")
    right.axhline(1.0, color="black", lw=0.8, ls="--")
    right.set_ylim(-1, 8)
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend()
    harness.save_figure(figure, path, title)


def parse() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--arm", choices=ARMS, action="append", help="train these alone; default: all"
    )
    parser.add_argument("--minutes", type=float, help="stop then, with a checkpoint to go on from")
    parser.add_argument("--steps", type=int, help=f"of each arm; default {FULL.steps}")
    parser.add_argument("--batch", type=int, help=f"windows a step; default {FULL.batch}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="a text file or a folder; default: the installed packages")
    parser.add_argument("--state", default="build/train_recipes", help="folder of checkpoints")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU; no result")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.tiny:
        harness.require_gpu()
    settings = TINY if args.tiny else FULL
    changes = {"steps": args.steps, "batch": args.batch, "seed": args.seed, "data": args.data}
    settings = replace(settings, **{k: v for k, v in changes.items() if v is not None})
    state = pathlib.Path(args.state)
    state.mkdir(parents=True, exist_ok=True)
    corpus, deadline = load_corpus(settings.data, settings.seq), harness.Deadline(args.minutes)
    n_parameters = sum(p.numel() for p in build_model(settings).parameters())
    # Not corpus.describe(), which names a folder of this machine.
    megabytes = (corpus.pretrain.numel() + corpus.heldout.numel()) / 1e6
    text = f"{corpus.n_files} files, {megabytes:.1f} MB to train on and hold out, sha256 {corpus.digest[:12]}"
    print(f"{n_parameters / 1e6:.1f} M parameters; {text}")
    key = {"settings": asdict(settings), "digest": corpus.digest}
    results: dict[str, dict[str, Any]] = {}
    for name in args.arm or ARMS:
        done = state / f"{name}.json"
        kept = json.loads(done.read_text()) if done.exists() else None
        if kept is not None and kept.get("key") != key:
            raise SystemExit(
                f"{done} is of other settings or text; remove it, or take another --state"
            )
        try:
            results[name] = kept or train(name, settings, corpus, state, deadline)
        except Stopped as stopped:
            raise SystemExit(f"{stopped}; the same command goes on from there") from None
        done.write_text(json.dumps(results[name] | {"key": key}) + "\n")
        (state / f"{name}.pt").unlink(missing_ok=True)
    rows = rows_of(results, settings)
    tokens = settings.steps * settings.batch * settings.seq
    portable = asdict(replace(settings, data=None))
    meta = dict(settings=portable, parameters=n_parameters, tokens=tokens, text=text)
    on_gpu = settings.device == "cuda"
    png = harness.save("train_recipes", meta, rows, None if on_gpu else state)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    sizes = f"{n_parameters / 1e6:.0f} M parameters, {tokens / 1e6:.0f} M bytes of text"
    plot(rows, png, f"{device}: {sizes}")
    columns = dict(arm="trained in", final="held-out loss", ratio="ratio to bf16", train="training loss",
                   final_nvfp4="held-out loss in NVFP4", step_ms="ms a step", minutes="minutes")  # fmt: skip
    print(harness.markdown(rows, columns))


if __name__ == "__main__":
    main()
