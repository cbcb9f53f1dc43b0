"""What a demo run is made of: one frozen record, checked once, stored in every checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from torchao_mx.demo.quant import FORMATS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class UsageError(ValueError):
    """The command line asks for something that cannot be done; the exit code is 2."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run. The defaults take about three minutes on two CPU cores.

    ``data`` is an absolute path, or None for the standard library's source; ``device`` and ``dtype``
    may be ``"auto"`` until :func:`resolve` has chosen.
    """

    format: str = "mxfp4"
    data: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    layers: int = 4
    dim: int = 128
    heads: int = 4
    seq: int = 128
    pretrain_steps: int = 1000
    steps: int = 300
    batch: int = 16
    pretrain_lr: float = 3e-3
    lr: float = 1e-3
    eval_windows: int = 512
    eval_every: int = 50

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
    "dim": 64,
    "heads": 2,
    "seq": 64,
    "pretrain_steps": 40,
    "steps": 20,
    "batch": 8,
    "eval_windows": 32,
    "eval_every": 10,
}


def resolve(settings: Settings) -> tuple[Settings, str]:
    """Settle device and dtype; the second value says which were taken and why.

    Raises:
        UsageError: the device does not exist here.
    """
    device, why = _resolve_device(settings.device)
    if settings.dtype != "auto":
        return replace(settings, device=str(device)), f"{device} ({why}), {settings.dtype} as asked"
    if device.type != "cpu":
        chosen, reason = "bf16", "the default on a GPU"
    else:
        speedup = _bf16_speedup()
        chosen = "bf16" if speedup > 1.5 else "fp32"
        reason = f"bf16 matmuls measured {speedup:.1f}x as fast as fp32 on this CPU"
    note = f"{device} ({why}), {chosen} weights and compute ({reason})"
    return replace(settings, device=str(device), dtype=chosen), note


def _resolve_device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), torch.cuda.get_device_name()
        return torch.device("cpu"), f"{torch.get_num_threads()} threads"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; use auto, cpu or cuda") from error
    if device.type == "cpu":
        return torch.device("cpu"), f"{torch.get_num_threads()} threads"
    if device.type != "cuda":
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device, torch.cuda.get_device_name(device)


def _bf16_speedup(rows: int = 2048, dim: int = 256, repeats: int = 5) -> float:
    """How many times as fast as fp32 a bf16 matmul is here: best of ``repeats``, about 50 ms."""
    from time import perf_counter

    def best(dtype: torch.dtype) -> float:
        x, w = torch.ones(rows, dim, dtype=dtype), torch.ones(4 * dim, dim, dtype=dtype)
        times = []
        for _ in range(repeats + 1):  # the first builds the kernel
            start = perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(perf_counter() - start)
        return min(times[1:])

    return best(torch.float32) / best(torch.bfloat16)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{_flag(name)} {value}: must be at least 1")
