"""A run: three phases of training, three endpoints, and a check of the converted checkpoint.

The files of a run's folder::

    checkpoint.pt    where training is, for --resume
    pretrained.pt    weights that both arms start from
    finetuned.pt     weights of arm 0, which arm 1 quantizes
    qat.pt           weights of arm 2, in high precision
    converted.pt     arm 2's quantized weights, for --verify
    results.json     settings, curves, table
    curves.png       the same as a picture
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchao_mx
from torchao_mx.demo import checkpoint, report
from torchao_mx.demo.checkpoint import CheckpointError
from torchao_mx.demo.data import Corpus, load_corpus
from torchao_mx.demo.device import reproducible
from torchao_mx.demo.model import build_model, heldout_losses
from torchao_mx.demo.quant import (
    convert_qat,
    prepare_qat,
    quantize_after_training,
    weight_bytes,
)
from torchao_mx.demo.settings import Settings, UsageError
from torchao_mx.demo.train import MasterAdam, OnStep, Phase, train_phase

PRETRAIN, FINETUNE, QAT = "pretrain", "finetune", "qat"
_WEIGHTS = {PRETRAIN: "pretrained.pt", FINETUNE: "finetuned.pt", QAT: "qat.pt"}
_CHECKPOINT, _CONVERTED, _RESULTS, _PLOT = (
    "checkpoint.pt",
    "converted.pt",
    "results.json",
    "curves.png",
)


# What the records in these files hold.
_OF_CHECKPOINT = frozenset({"settings", "corpus_digest", "current", "phases", "model", "optimizer"})
_OF_CONVERTED = frozenset({"settings", "corpus_digest", "heldout_loss", "model"})
_OF_WEIGHTS = frozenset({"settings", "model"})


class VerificationError(RuntimeError):
    """A reloaded checkpoint has not the loss it was saved with; the exit code is 1."""


@dataclass
class Endpoint:
    """A finished model: the mean loss of each held-out window, and the bytes of its weights."""

    losses: torch.Tensor
    total_bytes: int
    linear_bytes: int


class Run:
    """A run in the folder ``out``; ``settings`` are resolved. :meth:`execute` does all of it."""

    def __init__(self, settings: Settings, out: Path, on_step: OnStep | None = None) -> None:
        self.settings = settings
        self.out = out
        self.on_step = on_step
        self.corpus: Corpus = load_corpus(settings.data, settings.seq)
        windows = self.corpus.heldout_windows(settings.eval_windows, settings.seq)
        self.heldout = windows.to(settings.device)
        self.phases = _phases(settings)
        self.current = PRETRAIN
        self.resumed: dict[str, Any] | None = None

    @classmethod
    def resume(cls, out: Path, on_step: OnStep | None = None) -> Run:
        """The run in ``out``, as its last checkpoint left it.

        Raises:
            CheckpointError: there is none, it is damaged, or the text has changed since.
        """
        record = checkpoint.load(out / _CHECKPOINT, "a training checkpoint", _OF_CHECKPOINT)
        run = cls(_settings_of(record, out / _CHECKPOINT), out, on_step)
        _check_corpus(record, run.corpus, out / _CHECKPOINT)
        run.current = record["current"]
        for name, state in record["phases"].items():
            for key, value in state.items():
                setattr(run.phases[name], key, value)
        run.resumed = record
        return run

    def execute(self) -> dict[str, Any]:
        """Train what is left, compare, verify, plot. Returns what ``results.json`` holds.

        Raises:
            Interrupted: Ctrl-C stopped the training; ``checkpoint.pt`` is up to date.
            VerificationError: the converted checkpoint's loss is not the one measured here.
        """
        with reproducible(self.settings):
            names = list(self.phases)
            for name in names[names.index(self.current) :]:
                self.current = name
                self._train(self.phases[name])
            return self._finish()

    def _train(self, phase: Phase) -> None:
        print(f"{phase.label}: {phase.steps} steps" + (f" from {phase.step}" * bool(phase.step)))
        record, self.resumed = self.resumed, None
        if record is not None:
            model = self._model(record["model"])
        elif phase.name == PRETRAIN:
            model = build_model(self.settings)
        else:
            model = self._model(self._load_weights(PRETRAIN))
        if phase.name == QAT:
            prepare_qat(model, self.settings.format)
        optimizer = MasterAdam(model)
        if record is not None:
            optimizer.load_state_dict(record["optimizer"])

        def save() -> None:
            self._save_checkpoint(model, optimizer)

        if record is None:
            save()
        train_phase(
            phase, model, optimizer, self.corpus, self.heldout, self.settings, save, self.on_step
        )
        weights = {"model": model.state_dict(), "settings": self.settings.to_dict()}
        checkpoint.save(self.out / _WEIGHTS[phase.name], weights)

    def _finish(self) -> dict[str, Any]:
        endpoints = self._endpoints()
        verification = verify_in_fresh_process(self.out / _CONVERTED)
        curves = {name: phase.history for name, phase in self.phases.items()}
        losses = {
            "start": curves[FINETUNE][0][1],
            "start_ptq": curves[QAT][0][1],  # fake quantization before any step is PTQ
            "qat_before_convert": curves[QAT][-1][1],
        }
        results = {
            "settings": self.settings.to_dict(),
            "corpus": self.corpus.describe(),
            "heldout_tokens": self.heldout[:, 1:].numel(),
            "curves": curves,
            "table": report.table_rows(endpoints, self.settings),
            "losses": losses,
            "verification": verification,
            "seconds": {name: round(phase.seconds, 1) for name, phase in self.phases.items()},
            "versions": {"torch": torch.__version__, "device": _device_name(self.settings)},
        }
        report.plot(results, self.out / _PLOT)
        checkpoint.save_json(self.out / _RESULTS, results)
        return results

    def _endpoints(self) -> dict[str, Endpoint]:
        """Measure the three arms; save arm 2 converted."""
        fmt = self.settings.format
        finetuned = self._model(self._load_weights(FINETUNE))
        endpoints = {"high_precision": self._measure(finetuned)}
        quantize_after_training(finetuned, fmt)
        endpoints["ptq"] = self._measure(finetuned)

        qat = self._model(self._load_weights(QAT))
        prepare_qat(qat, fmt)
        convert_qat(qat, fmt)
        endpoints["qat"] = self._measure(qat)
        record = {
            "settings": self.settings.to_dict(),
            "corpus_digest": self.corpus.digest,
            "heldout_loss": endpoints["qat"].losses.mean().item(),
            "model": qat.state_dict(),
        }
        checkpoint.save(self.out / _CONVERTED, record)
        return endpoints

    def _measure(self, model: nn.Module) -> Endpoint:
        losses = heldout_losses(model, self.heldout, self.settings.batch)
        return Endpoint(losses, *weight_bytes(model))

    def _model(self, state: dict[str, torch.Tensor]) -> nn.Module:
        model = build_model(self.settings)
        model.load_state_dict(state)
        return model

    def _load_weights(self, phase: str) -> dict[str, torch.Tensor]:
        return checkpoint.load(self.out / _WEIGHTS[phase], "weights", _OF_WEIGHTS)["model"]

    def _save_checkpoint(self, model: nn.Module, optimizer: MasterAdam) -> None:
        record = {
            "settings": self.settings.to_dict(),
            "corpus_digest": self.corpus.digest,
            "current": self.current,
            "phases": {name: phase.state_dict() for name, phase in self.phases.items()},
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        checkpoint.save(self.out / _CHECKPOINT, record)


def is_unfinished(out: Path) -> bool:
    """Whether ``out`` holds a run that stopped before its end."""
    return (out / _CHECKPOINT).exists() and not (out / _RESULTS).exists()


def clear(out: Path) -> None:
    """Make ``out`` a folder without a run in it; files that are not a run's stay."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (_RESULTS, _CHECKPOINT, _CONVERTED, _PLOT, *_WEIGHTS.values()):
        (out / name).unlink(missing_ok=True)


def verify(path: Path) -> float:
    """The held-out loss of a converted checkpoint, if it is the one recorded in it.

    Raises:
        CheckpointError: the file is not such a checkpoint, or the text has changed since.
        VerificationError: the two differ in any bit.
    """
    record = checkpoint.load(path, "a converted checkpoint", _OF_CONVERTED)
    settings = _settings_of(record, path)
    corpus = load_corpus(settings.data, settings.seq)
    _check_corpus(record, corpus, path)
    model = build_model(settings)
    quantize_after_training(model, settings.format)
    try:
        model.load_state_dict(record["model"], assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its weights do not fit its settings: {error}") from error
    model.to(settings.device)
    heldout = corpus.heldout_windows(settings.eval_windows, settings.seq).to(settings.device)
    with reproducible(settings):
        loss = heldout_losses(model, heldout, settings.batch).mean().item()
    if loss != record["heldout_loss"]:
        raise VerificationError(
            f"{path}: held-out loss {loss!r} is not the recorded {record['heldout_loss']!r}; the "
            f"file was changed, or it comes from another machine or another version of torch"
        )
    return loss


def verify_in_fresh_process(path: Path) -> dict[str, Any]:
    """Run ``--verify`` on ``path`` in a new Python.

    Raises:
        VerificationError: it failed; the message is that process's.
    """
    package_root = Path(torchao_mx.__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torchao_mx.demo", "--verify", str(path.resolve())]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=package_root, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerificationError(f"fresh process, exit code {done.returncode}: {last}")
    seconds = round(time.perf_counter() - start, 1)
    return {"message": done.stdout.strip().splitlines()[-1], "seconds": seconds}


def _phases(settings: Settings) -> dict[str, Phase]:
    s = settings
    pretrain = Phase(
        PRETRAIN, "pretraining", "pretrain", s.pretrain_steps, s.pretrain_lr, s.pretrain_lr / 10
    )
    finetune = Phase(FINETUNE, f"arm 0, {s.dtype} fine-tune", "finetune", s.steps, s.lr, 0.0)
    qat = Phase(QAT, f"arm 2, QAT for {s.format}", "finetune", s.steps, s.lr, 0.0)
    return {phase.name: phase for phase in (pretrain, finetune, qat)}


def _settings_of(record: dict[str, Any], path: Path) -> Settings:
    try:
        settings = Settings.from_dict(record["settings"])
        settings.validate()
    except (UsageError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(f"{path}: made on a GPU, and torch sees none here")
    return settings


def _check_corpus(record: dict[str, Any], corpus: Corpus, path: Path) -> None:
    if record.get("corpus_digest") != corpus.digest:
        raise CheckpointError(
            f"{path}: the text of {corpus.name} is not the one this run was made with; put "
            f"it back, or start a new run"
        )


def _device_name(settings: Settings) -> str:
    if settings.device.startswith("cuda"):
        return torch.cuda.get_device_name(settings.device)
    return "cpu"
