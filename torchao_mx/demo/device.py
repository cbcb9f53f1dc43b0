"""Which device and dtype a run takes when it may choose."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import torch

from torchao_mx.demo.model import build_model, token_losses
from torchao_mx.demo.settings import Settings, UsageError

# bf16 is what people train in, so it stands unless the CPU is this many times slower in it.
_TOLERATED_SLOWDOWN = 1.3


def resolve(settings: Settings) -> tuple[Settings, str]:
    """Settle device and dtype; the second value says which were taken and why.

    Raises:
        UsageError: the device does not exist here.
    """
    device, name = _resolve_device(settings.device)
    settings = replace(settings, device=str(device))
    if settings.dtype != "auto":
        return settings, f"{name}; {settings.dtype} weights and compute, as asked"
    if device.type != "cpu":
        return replace(settings, dtype="bf16"), f"{name}; bf16 weights and compute"
    seconds = {dtype: _step_seconds(replace(settings, dtype=dtype)) for dtype in ("bf16", "fp32")}
    chosen = "bf16" if seconds["bf16"] < _TOLERATED_SLOWDOWN * seconds["fp32"] else "fp32"
    measured = " and ".join(f"{1e3 * s:.0f} ms in {dtype}" for dtype, s in seconds.items())
    note = f"{name}; {chosen} weights and compute (a training step takes {measured} here)"
    return replace(settings, dtype=chosen), note


def _resolve_device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; use auto, cpu or cuda") from error
    if device.type == "cpu":
        return torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
    if device.type != "cuda":
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: no such device; torch sees {torch.cuda.device_count()} here, "
            f"counted from cuda:0"
        )
    return device, torch.cuda.get_device_name(device)


def _step_seconds(settings: Settings, repeats: int = 4) -> float:
    """Forward and backward of one batch: the best of ``repeats``, after one that sets up."""
    model = build_model(settings)
    tokens = torch.zeros(settings.batch, settings.seq + 1, dtype=torch.int64)
    times = []
    for _ in range(repeats + 1):
        start = perf_counter()
        token_losses(model, tokens).mean().backward()
        times.append(perf_counter() - start)
    return min(times[1:])
