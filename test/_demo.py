"""What the tests of the demo share."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchao_mx.demo import run
from torchao_mx.demo.model import token_losses


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the step after so many."""
    count = itertools.count()

    def losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        if next(count) == steps:
            raise KeyboardInterrupt
        return token_losses(model, tokens)

    monkeypatch.setattr(run, "token_losses", losses)


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())
