"""What a demo run is made of: one frozen record, checked once, stored in every checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from torchao_mx.demo.quant import FORMATS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class UsageError(ValueError):
    """The command line asks for something that cannot be done; the exit code is 2."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run. The defaults take about three minutes on two CPU cores.

    ``data`` is an absolute path, or None for the standard library's source; ``device`` and
    ``dtype`` may be ``"auto"``, and ``threads`` 0, until :func:`torchao_mx.demo.device.resolve` has
    chosen.
    """

    format: str = "mxfp4"
    data: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    layers: int = 4
    dim: int = 64
    heads: int = 1
    seq: int = 256
    pretrain_steps: int = 1500
    steps: int = 600
    batch: int = 8
    pretrain_lr: float = 4e-3
    lr: float = 2e-3
    eval_windows: int = 256
    eval_every: int = 100

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Settings:
        """The settings that a checkpoint recorded.

        Raises:
            ValueError: names are missing or unknown, that is, another version wrote them.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(
                "its settings are not those of this version of the demo; start a new run"
            )
        return cls(**values)  # type: ignore[arg-type]

    @property
    def hidden(self) -> int:
        """Width of the gated MLP: 8/3 of ``dim``, up to the next multiple of 32."""
        return -(-self.dim * 8 // 3 // 32) * 32

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def validate(self) -> None:
        """Raise UsageError, naming the flag, unless the settings describe a run."""
        if self.format not in FORMATS:
            raise UsageError(
                f"--format {self.format}: unknown format; choose one of {', '.join(FORMATS)}"
            )
        if self.dtype not in ("auto", *DTYPES):
            raise UsageError(f"--dtype {self.dtype}: choose one of auto, {', '.join(DTYPES)}")
        for name in ("layers", "dim", "heads", "seq", "pretrain_steps", "steps", "batch"):
            _check_positive(name, getattr(self, name))
        for name in ("eval_windows", "eval_every"):
            _check_positive(name, getattr(self, name))
        for name in ("lr", "pretrain_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{_flag(name)} {value:g}: must be a positive number")
        if self.threads < 0:
            raise UsageError(f"--threads {self.threads}: must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed {self.seed}: must be from 0 to {2**31 - 1}")
        if self.dim % 32:
            near = max(32, round(self.dim / 32) * 32)
            raise UsageError(
                f"--dim {self.dim}: not a multiple of 32, the block size of the MX formats; "
                f"try --dim {near}"
            )
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise UsageError(
                f"--heads {self.heads}: --dim {self.dim} must divide into heads of an even width; "
                f"try --heads {self.dim // 32}"
            )
        if self.seq < 2:
            raise UsageError(f"--seq {self.seq}: needs at least 2 tokens")
        if self.data is not None and not Path(self.data).exists():
            raise UsageError(f"--data {self.data}: no such file or folder")


#: What ``--quick`` puts in place of the defaults: a smoke test of a few seconds, no result.
QUICK = {
    "layers": 2,
    "dim": 32,
    "heads": 1,
    "seq": 64,
    "pretrain_steps": 40,
    "steps": 20,
    "batch": 8,
    "eval_windows": 32,
    "eval_every": 10,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{_flag(name)} {value}: must be at least 1")
