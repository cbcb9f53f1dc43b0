"""A run of the demo in its folder: phases of training that can stop and go on, and what comes of them.

What is trained is in a module of the method's name: ``load_corpus(data, seq)`` and ``build(settings)``
make the text and the first model, ``compare(run)`` trains, measures and saves, ``conclude(run, results)``
draws the picture and returns the table, and ``verify(settings, out, losses)`` loads what was saved and
raises DemoError unless its loss is the one measured. Every run's folder gets::

    settings.json    the options
    PHASE.pt         until the end: weights and optimizer of a phase, to go on from
    results.json     options, curves, table
    curves.png       the same as a picture
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from torchao_mx.demo.model import heldout_losses, token_losses
from torchao_mx.demo.settings import DemoError, Settings

PRETRAIN = "pretrain"


class Run:
    """A run in the folder ``out``; :meth:`execute` does all of it."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.method = importlib.import_module(f"torchao_mx.demo.{settings.method}")
        self.corpus = self.method.load_corpus(settings.data, settings.seq)
        windows = self.corpus.heldout_windows(settings.eval_windows, settings.seq)
        self.heldout = windows.to(settings.device)
        self.curves: dict[str, list[list[float]]] = {}
        self.key = {"settings": asdict(settings), "corpus_digest": self.corpus.digest}
        torch.set_num_threads(settings.threads)  # on which the last bits depend
        if settings.device != "cpu":
            torch.use_deterministic_algorithms(True, warn_only=True)

    def execute(self) -> None:
        """Train what is left, compare, report, and load what was saved in a fresh process.

        Raises:
            DemoError: the folder holds another run, training diverged, or what was saved does not
                have the loss measured here.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        states = [self.out / f"{name}.pt" for name in self.method.PHASES]
        path = self.out / "settings.json"
        if any(map(Path.exists, states)) and json.loads(path.read_text()) != self.key:
            raise DemoError(
                f"{self.out} holds an unfinished run of other options or text: give the options of its "
                f"{path.name}, remove the folder, or choose another --out"
            )
        path.write_text(json.dumps(self.key, indent=1))
        found = self.method.compare(self)
        tokens = self.heldout[:, 1:].numel()
        results = {**self.key, "heldout_tokens": tokens, "curves": self.curves, **found}
        print(f"\n{self.method.conclude(self, results)}\n")
        (self.out / "results.json").write_text(json.dumps(results, indent=1))
        losses = [row["heldout_loss"] for row in results["table"]]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            found = fresh.submit(self.method.verify, self.settings, self.out, losses).result()
        print(f"In a fresh process: {found}")
        for state in states:
            state.unlink()

    def train(self, name: str, label: str, model: nn.Module) -> nn.Module:
        """Train ``model`` to the end of a phase, from the phase's last checkpoint if there is one.

        All phases but pretraining see the same batches in the same order.
        """
        s, path, curve = self.settings, self.out / f"{name}.pt", self.curves.setdefault(name, [])
        data, steps, lr = "finetune", s.steps, s.lr
        if name == PRETRAIN:
            data, steps, lr = name, s.pretrain_steps, s.pretrain_lr
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(weights.values(), lr, betas=(0.9, 0.95), fused=True)
        schedule = OneCycleLR(optimizer, lr, steps, pct_start=0.07, cycle_momentum=False)
        if path.exists():
            state = torch.load(path, map_location=s.device, weights_only=True)
            model.load_state_dict(state["weights"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            curve += state["curve"]
        print(f"{label}: {steps} steps" + (f", from {curve[-1][0]}" if curve else ""), flush=True)

        def evaluate(step: int) -> None:
            loss = self.measure(model).mean().item()
            if not math.isfinite(loss):
                raise DemoError(f"{label}: held-out loss {loss} at step {step}; give a lower --lr")
            tqdm.write(f"  step {step}/{steps}: held-out {loss:.4f}")
            curve.append([step, loss])
            states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save(path, {"curve": curve, "weights": weights, **states})

        model.train()
        if not curve:
            evaluate(0)
        for step in tqdm(range(curve[-1][0], steps), unit="step", disable=None, leave=False):
            tokens = self.corpus.batch(data, step, s.seed, s.batch, s.seq).to(s.device)
            token_losses(model, tokens).mean().backward()
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % s.eval_every == 0 or step + 1 == steps:
                evaluate(step + 1)
        return model

    def measure(self, model: nn.Module) -> torch.Tensor:
        """The mean loss of each held-out window."""
        return heldout_losses(model, self.heldout, self.settings.batch)


def save(path: Path, record: dict[str, Any]) -> None:
    """``torch.save``, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    torch.save(record, temporary)
    temporary.replace(path)
