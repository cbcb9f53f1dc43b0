"""The options of a run: one frozen record, whose fields are the options of the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchao_mx.demo.quant import FORMATS


class DemoError(RuntimeError):
    """What went wrong, for the user to read without a traceback; the exit code is 1."""


def _option(default: Any, text: str, **arguments: Any) -> Any:
    """A field, with what ``add_argument`` is to be told of it."""
    return field(default=default, metadata={"help": text, **arguments})


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def _existing(text: str) -> str:
    path = Path(text).expanduser().resolve()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{path}: no such file or folder")
    return str(path)


def _device(text: str) -> str:
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return text


@dataclass(frozen=True)
class Settings:
    """The defaults are those of ``--method qat``; :data:`LORA` has what ``--method lora`` changes."""

    method: str = _option("qat", "what is done, as above", choices=("qat", "lora"))
    format: str = _option("mxfp4", "qat: what arms 1 and 2 end in", choices=FORMATS)
    data: str | None = _option(
        None, "a text file or a folder of text, for lora to adapt to", type=_existing
    )
    seed: int = _option(0, "for the first weights and the order of the data", type=int)
    device: str = _option("auto", "cpu, cuda or cuda:N; auto: a GPU if any", type=_device)
    threads: int = _option(1, "CPU threads; more pay from about --dim 256 on", type=_count)
    layers: int = _option(4, "transformer blocks", type=_count)
    dim: int = _option(64, "width, a multiple of 32", type=_count)
    heads: int = _option(1, "attention heads", type=_count)
    seq: int = _option(128, "bytes a window", type=_count)
    experts: int = _option(8, "lora: experts a layer", type=_count)
    top_k: int = _option(2, "lora: experts that a token goes to", type=_count)
    rank: int = _option(4, "lora: of the adapters", type=_count)
    pretrain_steps: int = _option(800, "steps that all arms share", type=_count)
    steps: int = _option(300, "fine-tuning steps of each arm", type=_count)
    batch: int = _option(8, "windows a step", type=_count)
    pretrain_lr: float = _option(4e-3, "peak learning rate of pretraining", type=float)
    lr: float = _option(2e-3, "that of fine-tuning, which decays to 0", type=float)
    eval_windows: int = _option(256, "held-out windows, or as many as there are", type=_count)
    eval_every: int = _option(100, "steps between evaluations and checkpoints", type=_count)

    @property
    def hidden(self) -> int:
        """Width of the gated MLP: 8/3 of ``dim``, up to the next multiple of 32."""
        return -(-self.dim * 8 // 3 // 32) * 32

    def problem(self) -> str | None:
        """What does not fit together."""
        if self.dim % 32:
            return f"--dim {self.dim}: not a multiple of 32, the block size of the MX formats"
        if self.dim % self.heads or self.dim // self.heads % 2:
            return f"--heads {self.heads}: --dim {self.dim} must divide into heads of an even width"
        if self.top_k > self.experts:
            return f"--top-k {self.top_k}: there are --experts {self.experts}"
        if self.rank > self.dim:
            return f"--rank {self.rank}: more than the weights' smaller side, --dim {self.dim}"
        for name in {"qat": ("experts", "top_k", "rank"), "lora": ("format",)}[self.method]:
            if getattr(self, name) != getattr(Settings, name):
                return f"--method {self.method} takes no {flag(name)}"
        return None


def flag(name: str) -> str:
    """The option that sets ``name``."""
    return f"--{name.replace('_', '-')}"


LORA = dict(layers=3, heads=2, pretrain_steps=500, steps=200, lr=5e-3, eval_every=50)

#: The defaults under ``--quick``: a smoke test of a few seconds, not a result.
QUICK = dict(
    layers=2, dim=32, seq=64, batch=8, pretrain_steps=40, steps=20, eval_every=10, eval_windows=32
)
