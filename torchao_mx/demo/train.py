"""One phase of training: a loop that can stop after any step and go on as if it had not."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn

from torchao_mx.demo.data import Corpus
from torchao_mx.demo.model import heldout_losses, token_losses
from torchao_mx.demo.settings import CommonSettings

#: Called after every step with the phase's name and the steps done.
OnStep = Callable[[str, int], None]

_LOG_EVERY = 10  # steps between two readings of the loss, each of which waits for the device


class Interrupted(Exception):
    """Training stopped between two steps, and its checkpoint is saved."""


class Diverged(RuntimeError):
    """The held-out loss is not a finite number; the exit code is 1."""


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
    settings: CommonSettings,
    save: Callable[[], None],
    on_step: OnStep | None = None,
) -> None:
    """Train ``model`` from ``phase.step`` to the phase's end, evaluating and saving on the way.

    Raises:
        Interrupted: Ctrl-C came; the step under way was finished and ``save`` called.
        Diverged: the held-out loss is not finite.
    """
    from tqdm import tqdm

    def evaluate(progress: str) -> None:
        loss = heldout_losses(model, heldout, settings.batch).mean().item()
        if not math.isfinite(loss):
            raise Diverged(
                f"{phase.label}: held-out loss {loss} at step {phase.step}; start again with a lower "
                f"--lr or --pretrain-lr than {phase.peak_lr:g}"
            )
        phase.history.append([phase.step, loss])
        bar.set_postfix_str(f"held-out {loss:.4f}")
        if bar.disable:
            print(f"  step {phase.step}/{phase.steps}: held-out {loss:.4f}{progress}", flush=True)

    model.train()
    bar = tqdm(
        total=phase.steps,
        initial=phase.step,
        unit="step",
        disable=None,  # quiet unless standard error is a terminal
        file=sys.stderr,
        dynamic_ncols=True,
    )
    meter = _Meter(phase.seconds)
    with bar, _interrupt_flag() as interrupted:
        if not phase.history:
            evaluate("")
        while phase.step < phase.steps:
            tokens = corpus.batch(
                phase.data, phase.step, settings.seed, settings.batch, settings.seq
            ).to(settings.device)
            loss = token_losses(model, tokens).mean()
            loss.backward()
            lr = learning_rate(phase.step, phase.steps, phase.peak_lr, phase.final_lr)
            optimizer.step(lr)
            phase.step += 1
            meter.count(settings.batch * settings.seq)
            bar.update()
            due = phase.step % settings.eval_every == 0 or phase.step == phase.steps
            if due or phase.step % _LOG_EVERY == 0:
                progress = f"loss {loss.item():.3f}, {meter.rate()}"
                bar.set_description(f"  {progress}", refresh=False)
            if due:
                with meter.paused():
                    evaluate(f", {progress}")
            phase.seconds = meter.seconds()
            try:
                if on_step is not None:
                    on_step(phase.name, phase.step)
            except KeyboardInterrupt:
                interrupted.set()
            if due or interrupted.is_set():
                save()
            if interrupted.is_set():
                raise Interrupted(f"{phase.label}, step {phase.step} of {phase.steps}")


class _Meter:
    """Seconds spent, those before a resume included, and the rate of the tokens counted here."""

    def __init__(self, seconds_before: float) -> None:
        self.before, self.start, self.tokens, self.pause = seconds_before, perf_counter(), 0, 0.0

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def seconds(self) -> float:
        return self.before + perf_counter() - self.start

    def rate(self) -> str:
        rate = self.tokens / (perf_counter() - self.start - self.pause)
        return f"{rate / 1e3:.1f}k tokens/s"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what runs in here out of the rate."""
        start = perf_counter()
        yield
        self.pause += perf_counter() - start


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that no step is cut in half; a second one stops."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # only the main thread may handle signals
        return

    def handle(signum: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        print("\nstopping after this step", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
