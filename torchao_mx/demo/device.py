"""Which device, threads and dtype a run takes when it may choose, and computing the same twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

import torch
from torch import nn

from torchao_mx.demo.model import token_losses
from torchao_mx.demo.settings import CommonSettings, UsageError

#: Makes the model that settings describe, freshly initialised.
Build = Callable[[CommonSettings], nn.Module]

# bf16 is what people train in, so it stands unless the CPU is this many times slower in it.
_TOLERATED_SLOWDOWN = 1.5

# Elements of an activation that are worth a thread. At 2**17 a second one gained 15 % here, and with
# another program on the cores it made a step ten times slower: threads wait for each other.
_ELEMENTS_A_THREAD = 2**17


def resolve(settings: CommonSettings, build: Build) -> tuple[CommonSettings, str]:
    """Settle device, threads and dtype; the second value says which were taken and why.

    Raises:
        UsageError: the device does not exist here.
    """
    device, name = _resolve_device(settings.device)
    threads = settings.threads or _threads(settings)
    settings = replace(settings, device=str(device), threads=threads)
    if device.type == "cpu":
        name = f"CPU, {threads} thread" + "s" * (threads > 1)
    if settings.dtype != "auto":
        return settings, f"{name}; {settings.dtype} weights and compute, as asked"
    if device.type != "cpu":
        return replace(settings, dtype="bf16"), f"{name}; bf16 weights and compute"
    with reproducible(settings):
        bf16, fp32 = _step_seconds(settings, build)
    chosen = "bf16" if bf16 < _TOLERATED_SLOWDOWN * fp32 else "fp32"
    measured = f"{1e3 * bf16:.0f} ms in bf16, {1e3 * fp32:.0f} ms in fp32"
    note = f"{name}; {chosen} weights and compute (a training step takes {measured})"
    return replace(settings, dtype=chosen), note


@contextmanager
def reproducible(settings: CommonSettings) -> Iterator[None]:
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


def _resolve_device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; use auto, cpu or cuda") from error
    if device.type == "cpu":
        return torch.device("cpu"), "CPU"
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


def _threads(settings: CommonSettings) -> int:
    worth = settings.batch * settings.seq * settings.dim // _ELEMENTS_A_THREAD
    return max(1, min(torch.get_num_threads(), worth))


def _step_seconds(settings: CommonSettings, build: Build, repeats: int = 5) -> tuple[float, float]:
    """Forward and backward of one batch in bf16 and fp32, in turns: the best of ``repeats``."""
    models = [build(replace(settings, dtype=dtype)) for dtype in ("bf16", "fp32")]
    tokens = torch.zeros(settings.batch, settings.seq + 1, dtype=torch.int64)
    best = [math.inf, math.inf]
    for _ in range(repeats):
        for index, model in enumerate(models):
            start = perf_counter()
            token_losses(model, tokens).mean().backward()
            best[index] = min(best[index], perf_counter() - start)
    return best[0], best[1]
