"""A phase of training that can stop after any step and go on to the same bits, and what its files are.

The model is the demo's in bf16, with fp32 masters in :class:`MasterAdam`.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from torchao_mx.demo.data import Corpus
from torchao_mx.demo.model import heldout_losses, token_losses
from torchao_mx.demo.settings import Settings

#: Called after every step with the phase's name and the steps done.
OnStep = Callable[[str, int], None]


class Interrupted(Exception):
    """Training stopped between two steps, and its checkpoint is saved."""


class MasterAdam:
    """Adam with its state and its copy of the weights in fp32, whatever the model computes in.

    bf16 weights alone would lose the updates smaller than 1/256 of a weight, which late in training
    is most of them. fp32 parameters are their own copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in self.params
        ]
        self.optimizer = torch.optim.Adam(self.masters, lr=0.0, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Clip the gradients to norm 1, update, and clear them."""
        for param, master in zip(self.params, self.masters, strict=True):
            if param is not master:
                master.grad = param.grad.float()
                param.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._refresh()

    def state_dict(self) -> dict[str, Any]:
        masters = [m.detach() for m in self.masters]
        return {"adam": self.optimizer.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["adam"])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self._refresh()

    def _refresh(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            if param is not master:
                param.copy_(master)


def learning_rate(step: int, steps: int, peak: float, floor: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine from ``peak`` to ``floor``."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Phase:
    """A stretch of training and how far it has come.

    ``data`` names the part of the corpus that it reads: phases that read the same part, with the
    same seed, see the same batches. ``history`` holds ``[step, held-out loss]`` pairs.
    """

    name: str
    label: str
    data: str
    steps: int
    peak_lr: float
    final_lr: float
    step: int = 0
    seconds: float = 0.0
    history: list[list[float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "history": self.history}


def train_phase(
    phase: Phase,
    model: nn.Module,
    optimizer: MasterAdam,
    corpus: Corpus,
    heldout: torch.Tensor,
    settings: Settings,
    save: Callable[[], None],
    on_step: OnStep | None = None,
) -> None:
    """Train ``model`` from ``phase.step`` to the phase's end, evaluating and saving on the way.

    Raises:
        Interrupted: Ctrl-C came; the step under way was finished and ``save`` called.
        RuntimeError: the held-out loss is not finite.
    """
    s, start = settings, perf_counter() - phase.seconds

    def evaluate() -> None:
        loss = heldout_losses(model, heldout, s.batch).mean().item()
        if not math.isfinite(loss):
            raise RuntimeError(f"{phase.label}: held-out loss {loss} at step {phase.step}")
        phase.history.append([phase.step, loss])
        tqdm.write(f"  step {phase.step}/{phase.steps}: held-out {loss:.4f}")

    model.train()
    bar = tqdm(total=phase.steps, initial=phase.step, unit="step", disable=None, leave=False)
    with bar, _ctrl_c_between_steps() as signals:
        if not phase.history:
            evaluate()
        while phase.step < phase.steps:
            tokens = corpus.batch(phase.data, phase.step, s.seed, s.batch, s.seq).to(s.device)
            token_losses(model, tokens).mean().backward()
            optimizer.step(learning_rate(phase.step, phase.steps, phase.peak_lr, phase.final_lr))
            phase.step += 1
            bar.update()
            due = phase.step % s.eval_every == 0 or phase.step == phase.steps
            if due:
                evaluate()
            phase.seconds = perf_counter() - start
            try:
                if on_step is not None:
                    on_step(phase.name, phase.step)
            except KeyboardInterrupt:
                signals.append(signal.SIGINT)
            if due or signals:
                save()
            if signals:
                raise Interrupted(f"{phase.label}, step {phase.step} of {phase.steps}")


@contextmanager
def _ctrl_c_between_steps() -> Iterator[list[int]]:
    """A list that the first Ctrl-C appends to, so that no step is cut in half; a second one stops."""
    signals: list[int] = []

    def handle(signum: int, frame: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(signum)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def reproducible(settings: Settings) -> Iterator[None]:
    """Compute the same bits in every process: the run's threads, and CUDA's deterministic kernels."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(settings.threads)
    if settings.device.startswith("cuda"):
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def save(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` (tensors and plain values) so that ``path`` is never half written."""
    temporary = path.with_name(f".{path.name}.new")
    torch.save(record, temporary)
    temporary.replace(path)


def save_json(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)
