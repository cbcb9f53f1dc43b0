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
class CommonSettings:
    """What every method has; each gives the defaults of its own.

    ``data`` is an absolute path, or None for text that comes with Python; ``device`` and ``dtype``
    may be ``"auto"``, and ``threads`` 0, until :func:`torchao_mx.demo.device.resolve` has chosen.
    """

    method: str
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

    @property
    def name(self) -> str:
        """What the run's folder is called by."""
        return self.method

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def validate(self) -> None:
        """Raise UsageError, naming the flag, unless the settings describe a run."""
        if self.dtype not in ("auto", *DTYPES):
            raise UsageError(f"--dtype {self.dtype}: choose one of auto, {', '.join(DTYPES)}")
        for name in ("layers", "dim", "heads", "seq", "pretrain_steps", "steps", "batch"):
            _check_positive(name, getattr(self, name))
        for name in ("eval_windows", "eval_every"):
            _check_positive(name, getattr(self, name))
        for name in ("lr", "pretrain_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{flag(name)} {value:g}: must be a positive number")
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


@dataclass(frozen=True)
class Settings(CommonSettings):
    """Of ``--method qat``. The defaults take about three minutes on two CPU cores."""

    method: str = "qat"
    format: str = "mxfp4"

    @property
    def name(self) -> str:
        return self.format

    @property
    def hidden(self) -> int:
        """Width of the gated MLP: 8/3 of ``dim``, up to the next multiple of 32."""
        return -(-self.dim * 8 // 3 // 32) * 32

    def validate(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(
                f"--format {self.format}: unknown format; choose one of {', '.join(FORMATS)}"
            )
        super().validate()


@dataclass(frozen=True)
class LoRASettings(CommonSettings):
    """Of ``--method lora``. The defaults take about three minutes on two CPU cores."""

    method: str = "lora"
    layers: int = 3
    heads: int = 2
    seq: int = 128
    pretrain_steps: int = 600
    steps: int = 200
    batch: int = 16
    lr: float = 5e-3
    eval_every: int = 50
    experts: int = 8
    top_k: int = 2
    rank: int = 4

    def validate(self) -> None:
        super().validate()
        for name in ("experts", "top_k", "rank"):
            _check_positive(name, getattr(self, name))
        if self.top_k > self.experts:
            raise UsageError(f"--top-k {self.top_k}: there are --experts {self.experts}")
        if self.rank > self.dim:
            raise UsageError(
                f"--rank {self.rank}: more than the weights' smaller side, --dim {self.dim}"
            )


METHODS: dict[str, type[CommonSettings]] = {"qat": Settings, "lora": LoRASettings}

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


def names_of(method: type[CommonSettings]) -> set[str]:
    return {field.name for field in fields(method)}


def settings_from(values: dict[str, object]) -> CommonSettings:
    """The settings that a checkpoint recorded.

    Raises:
        ValueError: names are missing or unknown, that is, another version wrote them.
    """
    method = METHODS.get(values.get("method")) if isinstance(values, dict) else None
    if method is None or set(values) != names_of(method):
        raise ValueError("its settings are not those of this version of the demo; start a new run")
    return method(**values)  # type: ignore[arg-type]


def flag(name: str) -> str:
    """The option that sets ``name``."""
    return "--" + name.replace("_", "-")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{flag(name)} {value}: must be at least 1")
