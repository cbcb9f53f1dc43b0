"""Does QAT pay? PTQ and QAT from one pretrained model, over the same batches, against a fine-tune in bf16.

    python -m benchmarks.quality.quality [--minutes 9] [--model dense|moe] [--format NAME] [--seeds N] ...
    python -m benchmarks.quality.quality --tiny    # on a CPU, in two minutes; shows that it runs, no result

Language models over bytes, of 102 M parameters (dense) and 170 M (8 experts a block, 2 of them a token), bf16
weights with fp32 masters. From each seed, which sets first weights and the order of the data, a model is
pretrained on the Python standard library's source. From there it goes on over C++, torch's own headers:

    arm 0    in bf16
    arm 1    arm 0's result, quantized (PTQ)
    arm 2    QAT for a format, then converted, and evaluated as converted

in MXFP4 weight-only, W4A8 and W4A4. Quantized are the linears of the blocks and the experts; embedding, head,
norms and routers stay in bf16. Compared is the loss on headers that no arm has seen, window by window.
Expected is quality (0) >= (2) > (1), in every seed; where that does not hold, the script says so.

Checked before a loss is printed: the converted model's logits are those of the trained one on all held-out
windows, bit for bit; the arms of a seed saw the same batches; all losses are finite.

``--minutes`` and Ctrl-C end a run between two steps; the same command goes on from there, to the bit. What is
done is in a small JSON file for each model and seed in the state folder; the large files are of what is not.

On an H200 both models together, in two processes at once, took nine minutes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from benchmarks.quality import train_loop
from benchmarks.quality.comparison import BF16, NAMES, Comparison, plot, rows_of, table
from benchmarks.quality.model import QualitySettings, build, is_quantized
from benchmarks.quality.train_loop import Interrupted, MasterAdam, Phase, reproducible, train_phase
from benchmarks.shared import harness
from torchao_mx.demo.data import Corpus, load_adaptation_corpus
from torchao_mx.demo.model import heldout_losses
from torchao_mx.demo.quant import FORMATS

HEADERS = pathlib.Path(torch.__file__).parent / "include" / "torch"
DENSE = QualitySettings(
    layers=8, dim=1024, heads=16, seq=1024, batch=16, device="cuda", threads=1,
    data=str(HEADERS), eval_windows=512, pretrain_steps=800, steps=250, pretrain_lr=6e-4, lr=3e-4,
    eval_every=1 << 20,  # at the ends of a phase alone
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "moe": replace(DENSE, dim=768, heads=12, experts=8, top_k=2, expert_dim=1024),
}
TINY = dict(
    layers=1, dim=64, heads=2, seq=64, batch=8, device="cpu", data=None, eval_windows=64,
    pretrain_steps=100, steps=30, pretrain_lr=4e-3, lr=2e-3,
)  # fmt: skip
TINY_EXPERTS = dict(experts=4, expert_dim=96)
PRETRAIN = "pretrain"


class HashedCorpus:
    """A corpus, and a hash of the batches drawn from it in their order."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.digest = corpus, ""

    def batch(self, *which: Any) -> torch.Tensor:
        """As ``Corpus.batch``."""
        tokens = self.corpus.batch(*which)
        self.digest = hashlib.sha256(self.digest.encode() + tokens.numpy().tobytes()).hexdigest()
        return tokens


class Unit:
    """All arms of one model from one seed; its JSON in ``state`` has those that are done."""

    def __init__(
        self,
        name: str,
        settings: QualitySettings,
        corpus: Corpus,
        state: pathlib.Path,
        deadline: harness.Deadline,
    ) -> None:
        self.name, self.settings, self.corpus = f"{name}-seed{settings.seed}", settings, corpus
        self.deadline = deadline
        windows = corpus.heldout_windows(settings.eval_windows, settings.seq)
        self.windows = windows.to(settings.device)
        self.json = state / f"{self.name}.json"
        self.pretrained = state / f"{self.name}-pretrained.pt"
        # Not the text's folder, which differs between machines.
        self.key = {"settings": asdict(replace(settings, data=None)), "digest": corpus.digest}
        self.phases: dict[str, Any] = {}
        if self.json.exists():
            record = json.loads(self.json.read_text())
            self._check(self.json, record["key"])
            self.phases = record["phases"]

    def _check(self, path: pathlib.Path, key: dict[str, Any]) -> None:
        if key != self.key:
            raise SystemExit(
                f"{path} is of other settings or text; remove it, or take another --state"
            )

    def _load(self, path: pathlib.Path) -> dict[str, Any]:
        record = train_loop.load(path)
        self._check(path, record["key"])
        return record

    def is_done(self, formats: list[str]) -> bool:
        return all(name in self.phases for name in (BF16, *formats))

    def run(self, formats: list[str]) -> None:
        """Train and measure what is left.

        Raises:
            Interrupted: the time is over, or Ctrl-C came; the state is up to date.
        """
        if self.is_done(formats):
            return
        start = self._pretrain()
        digest = digest_of(start)
        for name in (BF16, *formats):
            if name not in self.phases:
                self._finetune(name, copy.deepcopy(start), digest)
        if self.is_done(list(NAMES)):
            self.pretrained.unlink(missing_ok=True)

    def _pretrain(self) -> nn.Module:
        """The model that all arms start from."""
        s, model = self.settings, build(self.settings)
        if self.pretrained.exists():
            model.load_state_dict(self._load(self.pretrained)["model"])
            return model
        what, lr = f"{self.name}, pretraining", s.pretrain_lr
        phase = Phase(PRETRAIN, what, PRETRAIN, s.pretrain_steps, lr, lr / 10)

        def keep() -> dict[str, Any]:
            train_loop.save(self.pretrained, {"key": self.key, "model": model.state_dict()})
            return {"parameters": sum(p.numel() for p in model.parameters())}

        self._train(phase, model, keep)
        return model

    def _finetune(self, name: str, model: nn.Module, start: str) -> None:
        """Arm 0 and all arms 1, or the arm 2 of a format; ``start`` is the digest of the first weights."""
        what = f"{self.name}, {'bf16' if name == BF16 else 'QAT for ' + NAMES[name]}"
        phase = Phase(name, what, "finetune", self.settings.steps, self.settings.lr, 0.0)
        if name != BF16:
            config = QATConfig(FORMATS[name], step="prepare")
            quantize_(model, config, filter_fn=is_quantized)
            self._converted(name, model, self.windows[: self.settings.batch])  # fails early

        def keep() -> dict[str, Any]:
            if name == BF16:
                losses = self._with_ptq(model)
            else:
                losses = {name: self._measure(self._converted(name, model, self.windows))}
            return {"losses": losses, "start": start}

        self._train(phase, model, keep)

    def _with_ptq(self, model: nn.Module) -> dict[str, list[float]]:
        losses = {BF16: self._measure(model)}
        for fmt in NAMES:
            quantized = copy.deepcopy(model)
            quantize_(quantized, FORMATS[fmt], filter_fn=is_quantized)
            losses[fmt] = self._measure(quantized)
        return losses

    def _converted(self, name: str, model: nn.Module, windows: torch.Tensor) -> nn.Module:
        """The trained model converted, its logits on ``windows`` being the same."""
        converted = copy.deepcopy(model)
        config = QATConfig(FORMATS[name], step="convert")
        quantize_(converted, config, filter_fn=is_quantized)
        same = has_same_logits(model, converted, windows, self.settings.batch)
        harness.gate(f"{self.name}, {NAMES[name]} converted", same)
        return converted

    def _measure(self, model: nn.Module) -> list[float]:
        losses = heldout_losses(model, self.windows, self.settings.batch)
        harness.gate(f"{self.name}: finite losses", bool(losses.isfinite().all()))
        return losses.tolist()

    def _train(self, phase: Phase, model: nn.Module, keep: Callable[[], dict[str, Any]]) -> None:
        """Train a phase to its end, from its checkpoint if there is one, and record what ``keep`` returns."""
        path = self.json.with_name(f"{self.name}-{phase.name}-unfinished.pt")
        optimizer, batches = MasterAdam(model), HashedCorpus(self.corpus)
        if path.exists():
            saved = self._load(path)
            phase.step, phase.seconds = saved["phase"]["step"], saved["phase"]["seconds"]
            phase.history, batches.digest = saved["phase"]["history"], saved["batches"]
            optimizer.load_state_dict(saved["optimizer"])  # and the weights, which it has in fp32
        print(f"{phase.label}: {phase.steps} steps" + f" from {phase.step}" * bool(phase.step))

        def save() -> None:
            if phase.step < phase.steps:
                record = {"phase": phase.state_dict(), "batches": batches.digest}
                state = {"key": self.key, "optimizer": optimizer.state_dict()}
                train_loop.save(path, record | state)
                return
            record = keep() | {"batches": batches.digest} | phase.state_dict()
            self.phases[phase.name] = record
            train_loop.save_json(self.json, {"key": self.key, "phases": self.phases})
            path.unlink(missing_ok=True)

        def stop_in_time(name: str, steps: int) -> None:
            if self.deadline:
                raise KeyboardInterrupt  # train_phase takes it as Ctrl-C

        train_phase(
            phase, model, optimizer, batches, self.windows, self.settings, save, stop_in_time
        )


def digest_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def has_same_logits(model: nn.Module, other: nn.Module, windows: torch.Tensor, batch: int) -> bool:
    parts = [part[:, :-1] for part in windows.split(batch)]
    return all(torch.equal(model(part), other(part)) for part in parts)


def compare(units: dict[str, list[Unit]], formats: list[str]) -> list[Comparison]:
    """Of each model that has a complete seed; the arms of one saw the same weights and batches."""
    for unit in itertools.chain(*units.values()):
        arms = [unit.phases[name] for name in (BF16, *formats)]
        same = len({(arm["start"], arm["batches"]) for arm in arms}) == 1
        harness.gate(f"{unit.name}: the arms' first weights and batches", same)
    seeds = {model: [unit.phases for unit in done] for model, done in units.items() if done}
    return [Comparison.of(model, fmt, seeds[model]) for model in seeds for fmt in formats]


def parse() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--format", choices=NAMES, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--minutes", type=float, help="stop then, with a checkpoint to go on from")
    parser.add_argument("--pretrain-steps", type=int, help=f"default {DENSE.pretrain_steps}")
    parser.add_argument("--steps", type=int, help=f"of each arm; default {DENSE.steps}")
    parser.add_argument("--batch", type=int, help=f"windows a step; default {DENSE.batch}")
    parser.add_argument("--data", help="a text file or a folder to fine-tune on; default: headers")
    parser.add_argument("--state", default="build/quality", help="folder of what is done")
    parser.add_argument("--tiny", action="store_true", help="on a CPU; no result")
    return parser.parse_args()


def settings_of(args: argparse.Namespace, model: str, seed: int) -> QualitySettings:
    settings = replace(MODELS[model], seed=seed)
    if args.tiny:
        settings = replace(settings, **TINY, **(TINY_EXPERTS if settings.experts else {}))
    changes = {name: getattr(args, name) for name in ("pretrain_steps", "steps", "batch", "data")}
    return replace(settings, **{k: v for k, v in changes.items() if v is not None})


def described(units: list[Unit]) -> dict[str, Any]:
    """A model, for the JSON."""
    phases = [phase for unit in units for phase in unit.phases.values()]
    return dict(
        settings=units[0].key["settings"], parameters=units[0].phases[PRETRAIN]["parameters"],
        minutes=sum(phase["seconds"] for phase in phases) / 60,
    )  # fmt: skip


def main() -> None:
    args = parse()
    if not args.tiny:
        harness.require_gpu()
    models, formats = args.model or list(MODELS), args.format or list(NAMES)
    state, deadline = pathlib.Path(args.state), harness.Deadline(args.minutes)
    state.mkdir(parents=True, exist_ok=True)
    first = settings_of(args, models[0], 0)
    corpus = load_adaptation_corpus(first.data, first.seq)
    sizes = [t.numel() / 1e6 for t in (corpus.pretrain, corpus.finetune, corpus.heldout)]
    text = "{:.1f} + {:.1f} + {:.1f} MB to pretrain, fine-tune and hold out".format(*sizes)
    text += f", sha256 {corpus.digest[:12]}"
    print(text)
    done: dict[str, list[Unit]] = {name: [] for name in models}
    stopped = None
    # With deterministic algorithms torch fills what it allocates, for the sake of kernels that forget to.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        for seed, model in itertools.product(range(args.seeds), models):
            unit = Unit(model, settings_of(args, model, seed), corpus, state, deadline)
            with reproducible(unit.settings):
                unit.run(formats)
            done[model].append(unit)
    except (Interrupted, KeyboardInterrupt) as stop:
        stopped = f"stopped ({stop or 'Ctrl-C'}); the same command goes on from there"
    comparisons = compare(done, formats)
    rows, verdicts = rows_of(comparisons), [c.verdict() for c in comparisons]
    print("\n".join([table(rows), "", *(v["text"] for v in verdicts)]))
    if stopped is not None:
        raise SystemExit(stopped)
    meta = dict(
        text=text,
        models={name: described(of_model) for name, of_model in done.items()},
        verdicts=verdicts,
    )
    on_gpu = first.device == "cuda"
    png = harness.save("quality", meta, rows, None if on_gpu else state)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    plot(comparisons, png, f"PTQ and QAT against bf16, {device}")


if __name__ == "__main__":
    main()
