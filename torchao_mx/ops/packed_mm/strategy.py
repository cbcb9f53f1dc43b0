"""Which strategy computes a product with a packed weight: what may be asked for, and what ``"auto"`` takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

STRATEGIES = ("auto", "fused", "unpack", "fused8", "unpack8")


STRATEGIES_OF_8_BITS = ("fused8", "unpack8")


DEFAULT_SCRATCH = 256 * 2**20  # bytes; or as many as the rows of x and y take, where that is more


class Crossover(NamedTuple):
    """``"auto"`` fuses below so many rows, of an expert or of a dense product, and unpacks from there on."""

    over_k: int  # an expert's, reduced over K
    over_n: int
    dense: int

    def fuses(self, n_rows: int, n_groups: int | None, transpose_weight: bool) -> bool:
        if n_groups is None:
            return n_rows < self.dense
        return n_rows < (self.over_k if transpose_weight else self.over_n) * n_groups


# Measured on an H200 (benchmarks/layers/lora_grouped.py, lora_linear.py). Where experts do not fit in the
# scratch, slices cost a copy of y; a dense weight's decode is soon repaid.
HOPPER_CROSSOVER = Crossover(1536, 1024, 512)


HOPPER_FP8_CROSSOVER = Crossover(4096, 1536, 512)


PORTABLE_CROSSOVER = Crossover(512, 512, 256)


def choose_strategy(
    strategy: str,
    compute: str,
    device: torch.device,
    dtype: torch.dtype,
    n_rows: int,
    n_groups: int | None,
    hopper: bool = False,
    transpose_weight: bool = True,
) -> str:
    """What computes a product of ``n_rows`` rows in ``n_groups`` groups (None: dense), with a Hopper kernel or not.

    - ``"fused"``: decode in the registers of one Triton GEMM; reads the fewest bytes, for few rows.
    - ``"unpack"``: decode into a scratch, then the vendor's GEMM; for many rows.
    - ``"fused8"``, ``"unpack8"``: these in 8 bits, where ``compute`` names an 8-bit dtype; the first for e4m3, on
      Hopper.
    - ``"reference"``: on the CPU, unless ``"unpack"`` is asked for.

    Raises:
        ValueError: ``"unpack"`` of groups on a GPU in a dtype other than bfloat16.
    """
    if compute:
        if strategy in STRATEGIES_OF_8_BITS:
            return strategy
        fuses = HOPPER_FP8_CROSSOVER.fuses(n_rows, n_groups, transpose_weight)
        return "fused8" if hopper and compute == "float8_e4m3fn" and fuses else "unpack8"
    if device.type != "cuda":
        return "unpack" if strategy == "unpack" else "reference"
    if n_groups is not None and dtype != torch.bfloat16:
        if strategy == "unpack":
            raise ValueError(
                f"x has dtype {dtype}; torch._grouped_mm, which strategy='unpack' uses, takes bfloat16 "
                f"on a GPU: convert x, or use strategy='fused'"
            )
        return "fused"
    if strategy != "auto":
        return strategy
    crossover = HOPPER_CROSSOVER if hopper else PORTABLE_CROSSOVER
    return "fused" if crossover.fuses(n_rows, n_groups, transpose_weight) else "unpack"


def check_strategy(strategy: str, max_scratch_bytes: int | None, compute: str = "") -> None:
    """Refuse a strategy that there is not, or not for this compute dtype."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is none of {', '.join(STRATEGIES)}")
    if strategy != "auto" and (strategy in STRATEGIES_OF_8_BITS) != bool(compute):
        raise ValueError(
            f"strategy={strategy!r} with compute_dtype={'torch.' + compute if compute else None}; "
            f"{' and '.join(STRATEGIES_OF_8_BITS)} are what computes in torch.float8_e4m3fn: leave strategy "
            f"out, or give both"
        )
    if max_scratch_bytes is not None and max_scratch_bytes <= 0:
        raise ValueError(
            f"max_scratch_bytes={max_scratch_bytes}; it must be a positive number, or None for the default"
        )
