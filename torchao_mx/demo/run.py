"""A run of the demo: phases of training that can stop and go on, then endpoints to compare.

``qat.py`` and ``lora.py`` say what the phases train. Every run's folder gets::

    checkpoint.pt    where training is, for --resume
    results.json     settings, curves, table
    curves.png       the same as a picture
"""

from __future__ import annotations

import subprocess
import sys
import time
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import torchao_mx
from torchao_mx.demo import checkpoint
from torchao_mx.demo.checkpoint import CheckpointError
from torchao_mx.demo.data import Corpus
from torchao_mx.demo.device import reproducible
from torchao_mx.demo.model import heldout_losses
from torchao_mx.demo.settings import CommonSettings, UsageError, settings_from
from torchao_mx.demo.train import MasterAdam, OnStep, Phase, train_phase

PRETRAIN = "pretrain"
_CHECKPOINT, _RESULTS, _PLOT = "checkpoint.pt", "results.json", "curves.png"
_OF_CHECKPOINT = frozenset({"settings", "corpus_digest", "current", "phases", "optimizer"})


class VerificationError(RuntimeError):
    """A reloaded checkpoint has not the loss it was saved with; the exit code is 1."""


class Run(ABC):
    """A run in the folder ``out``; ``settings`` are resolved. :meth:`execute` does all of it.

    A method is a subclass, with the phases after pretraining, the model of each, and what to make of
    them at the end.
    """

    #: Files in ``out`` that the method writes, beside those of every run.
    files: ClassVar[tuple[str, ...]]
    #: What of it all is loaded in a fresh process.
    made: ClassVar[tuple[str, ...]]

    def __init__(self, settings: CommonSettings, out: Path, on_step: OnStep | None = None) -> None:
        self.settings = settings
        self.out = out
        self.on_step = on_step
        self.corpus = self.load_corpus(settings)
        self.heldout = heldout_windows(self.corpus, settings)
        s = settings
        pretrain = Phase(
            PRETRAIN, "pretraining", "pretrain", s.pretrain_steps, s.pretrain_lr, s.pretrain_lr / 10
        )
        self.phases = {phase.name: phase for phase in (pretrain, *self.arms())}
        self.current = PRETRAIN
        self.resumed: dict[str, Any] | None = None

    @staticmethod
    def check_installed() -> None:
        """Raise UsageError if a package is missing that the method needs."""
        missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
        if missing:
            raise UsageError(
                f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}"
            )

    @staticmethod
    @abstractmethod
    def load_corpus(settings: CommonSettings) -> Corpus:
        """The text of a run."""

    @staticmethod
    @abstractmethod
    def build(settings: CommonSettings) -> nn.Module:
        """The model before pretraining, token ids ``[B, T]`` to logits, a function of the settings."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What is printed at the start, each under a word."""

    @abstractmethod
    def arms(self) -> list[Phase]:
        """The phases after pretraining."""

    @abstractmethod
    def model_of(self, phase: Phase) -> nn.Module:
        """What ``phase`` trains, as it starts."""

    @abstractmethod
    def keep(self, phase: Phase, model: nn.Module) -> None:
        """Save what ``phase`` has trained."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Compare and verify: ``table``, ``verification`` and more for ``results.json``.

        Raises:
            VerificationError: a saved model's loss, in a fresh process, is not the one measured here.
        """

    @staticmethod
    @abstractmethod
    def plot(results: dict[str, Any], path: Path) -> None:
        """Draw what ``results.json`` holds."""

    @staticmethod
    @abstractmethod
    def format_table(results: dict[str, Any]) -> str:
        """The table and what is to be said of it."""

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from a record of ``checkpoint.pt``."""
        self.current = record["current"]
        for name, state in record["phases"].items():
            for key, value in state.items():
                setattr(self.phases[name], key, value)
        self.resumed = record

    def execute(self) -> dict[str, Any]:
        """Train what is left, compare, verify, plot. Returns what ``results.json`` holds.

        Raises:
            Interrupted: Ctrl-C stopped the training; ``checkpoint.pt`` is up to date.
            VerificationError: as :meth:`finish`.
        """
        with reproducible(self.settings):
            names = list(self.phases)
            for name in names[names.index(self.current) :]:
                self.current = name
                self._train(self.phases[name])
            found = self.finish()
        results = {
            "settings": self.settings.to_dict(),
            "corpus": self.corpus.describe(),
            "heldout_tokens": self.heldout[:, 1:].numel(),
            "curves": self.curves,
            **found,
            "seconds": {name: round(phase.seconds, 1) for name, phase in self.phases.items()},
            "versions": {"torch": torch.__version__, "device": _device_name(self.settings)},
        }
        self.plot(results, self.out / _PLOT)
        checkpoint.save_json(self.out / _RESULTS, results)
        return results

    @property
    def curves(self) -> dict[str, list[list[float]]]:
        return {name: phase.history for name, phase in self.phases.items()}

    def measure(self, model: nn.Module) -> torch.Tensor:
        """The mean loss of each held-out window."""
        return heldout_losses(model, self.heldout, self.settings.batch)

    def _train(self, phase: Phase) -> None:
        print(f"{phase.label}: {phase.steps} steps" + (f" from {phase.step}" * bool(phase.step)))
        record, self.resumed = self.resumed, None
        model = self.model_of(phase)
        optimizer = MasterAdam(model)
        if record is not None:
            optimizer.load_state_dict(record["optimizer"])  # and the weights, which it has in fp32

        def save() -> None:
            self._save_checkpoint(optimizer)

        if record is None:
            save()
        train_phase(
            phase, model, optimizer, self.corpus, self.heldout, self.settings, save, self.on_step
        )
        self.keep(phase, model)

    def _save_checkpoint(self, optimizer: MasterAdam) -> None:
        record = {
            "settings": self.settings.to_dict(),
            "corpus_digest": self.corpus.digest,
            "current": self.current,
            "phases": {name: phase.state_dict() for name, phase in self.phases.items()},
            "optimizer": optimizer.state_dict(),
        }
        checkpoint.save(self.out / _CHECKPOINT, record)


def load_checkpoint(out: Path) -> tuple[CommonSettings, dict[str, Any]]:
    """The settings and the record of ``checkpoint.pt``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = out / _CHECKPOINT
    record = checkpoint.load(path, "a training checkpoint", _OF_CHECKPOINT)
    return settings_of(record, path), record


def check_corpus(record: dict[str, Any], corpus: Corpus, path: Path) -> None:
    """Refuse a record that was made with another text."""
    if record["corpus_digest"] != corpus.digest:
        raise CheckpointError(
            f"{path}: the text of {corpus.name} is not the one this run was made with; put "
            f"it back, or start a new run"
        )


def settings_of(record: dict[str, Any], path: Path) -> CommonSettings:
    """The settings of a record in the file ``path``.

    Raises:
        CheckpointError: they are of another version, or of a GPU that is not here.
    """
    try:
        settings = settings_from(record["settings"])
        settings.validate()
    except (UsageError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(f"{path}: made on a GPU, and torch sees none here")
    return settings


def heldout_windows(corpus: Corpus, settings: CommonSettings) -> torch.Tensor:
    """The windows that every loss of a run is of."""
    return corpus.heldout_windows(settings.eval_windows, settings.seq).to(settings.device)


def is_unfinished(out: Path) -> bool:
    """Whether ``out`` holds a run that stopped before its end."""
    return (out / _CHECKPOINT).exists() and not (out / _RESULTS).exists()


def clear(out: Path, files: tuple[str, ...]) -> None:
    """Make ``out`` a folder without a run in it; files that are not a run's stay."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (_RESULTS, _CHECKPOINT, _PLOT, *files):
        (out / name).unlink(missing_ok=True)


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


def _device_name(settings: CommonSettings) -> str:
    if settings.device.startswith("cuda"):
        return torch.cuda.get_device_name(settings.device)
    return "cpu"
