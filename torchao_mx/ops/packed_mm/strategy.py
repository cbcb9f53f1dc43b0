"""The choice of strategy for products with a packed weight: valid requests, and the rule of ``"auto"``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torchao_mx.formats import MXFP4, BlockFormat

STRATEGIES = ("auto", "fused", "unpack", "fused8", "unpack8")
STRATEGIES_OF_8_BITS = ("fused8", "unpack8")
DEFAULT_SCRATCH = 256 * 2**20  # bytes; or the size of the rows of x and y, if that is more


class Crossover(NamedTuple):
    """``"auto"`` fuses below this many rows, per expert or in a dense product, and unpacks from there on."""

    over_k: int  # per expert, reduced over K
    over_n: int
    dense: int

    def fuses(self, n_rows: int, n_groups: int | None, transpose_weight: bool) -> bool:
        if n_groups is None:
            return n_rows < self.dense
        return n_rows < (self.over_k if transpose_weight else self.over_n) * n_groups


# Measured on an H200 (benchmarks/layers/lora_grouped.py, lora_linear.py). If experts do not fit in the
# scratch buffer, slices cost a copy of y. A dense weight's decode soon pays off.
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
    """Choose the strategy for ``n_rows`` rows in ``n_groups`` groups (None: dense), with a Hopper kernel or not.

    - ``"fused"``: decode in the registers of one Triton GEMM; reads the fewest bytes, for few rows. -
    ``"unpack"``: decode into a scratch buffer, then call the vendor's GEMM; for many rows. - ``"fused8"``,
    ``"unpack8"``: the same in 8 bits, if ``compute`` names an 8-bit dtype; ``"fused8"`` is for
      e4m3 on Hopper.
    - ``"reference"``: on the CPU, unless ``"unpack"`` is requested.

    Raises:
        ValueError: ``"unpack"`` for groups on a GPU in a dtype other than bfloat16.
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
                f"x has dtype {dtype}; torch._grouped_mm, which strategy='unpack' uses, takes only bfloat16 "
                f"on a GPU: convert x, or use strategy='fused'"
            )
        return "fused"
    if strategy != "auto":
        return strategy
    crossover = HOPPER_CROSSOVER if hopper else PORTABLE_CROSSOVER
    return "fused" if crossover.fuses(n_rows, n_groups, transpose_weight) else "unpack"


_COMPUTE = {None: "", torch.float8_e4m3fn: "float8_e4m3fn"}
_GRAD_COMPUTE = {
    None: "",
    torch.bfloat16: "",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}


def compute_names(
    compute_dtype: torch.dtype | None,
    grad_compute_dtype: torch.dtype | None,
    fmt: BlockFormat,
    *,
    grouped: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[str, str]:
    """Return the two dtypes as the op's schema carries them, empty for x's own.

    Args:
        compute_dtype: of the forward product with a weight in ``fmt``: None, or ``torch.float8_e4m3fn``.
        grad_compute_dtype: of the product that gives x's gradient: None or ``torch.bfloat16`` for x's, or
            one of 8 bits.
        fmt: the weight's format.
        grouped: whether the weight holds experts.
        dtype: x's dtype, once there is an x.

    Raises:
        ValueError: a dtype that no product computes in.
    """
    if compute_dtype not in _COMPUTE:
        raise ValueError(
            f"compute_dtype={compute_dtype}; it must be None (x's dtype) or torch.float8_e4m3fn"
        )
    if grad_compute_dtype not in _GRAD_COMPUTE:
        raise ValueError(
            f"grad_compute_dtype={grad_compute_dtype}; it must be None or torch.bfloat16 (x's dtype), "
            f"torch.float8_e4m3fn or torch.float8_e5m2"
        )
    if grad_compute_dtype == torch.bfloat16 != dtype:
        raise ValueError(
            f"grad_compute_dtype=torch.bfloat16 and x has dtype {dtype}; gradients have x's dtype: convert x, "
            f"or leave grad_compute_dtype out"
        )
    if compute_dtype is None and _GRAD_COMPUTE[grad_compute_dtype]:
        raise ValueError(
            f"grad_compute_dtype={grad_compute_dtype} without a compute_dtype; give "
            f"compute_dtype=torch.float8_e4m3fn too"
        )
    if grouped and grad_compute_dtype == torch.float8_e5m2:
        raise ValueError(
            "grad_compute_dtype=torch.float8_e5m2 with experts; torch._scaled_grouped_mm takes only e4m3: "
            "use torch.float8_e4m3fn, or leave grad_compute_dtype out"
        )
    if compute_dtype is not None and fmt != MXFP4:
        raise ValueError(
            f"compute_dtype={compute_dtype} with a weight in {fmt.name}; only MXFP4 weights convert to e4m3 "
            f"without loss: leave compute_dtype out, or use MXFP4"
        )
    return _COMPUTE[compute_dtype], _GRAD_COMPUTE[grad_compute_dtype]


def check_strategy(strategy: str, max_scratch_bytes: int | None, compute: str = "") -> None:
    """Refuse an unknown strategy, or one that does not fit the compute dtype."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}; it must be one of {', '.join(STRATEGIES)}")
    if strategy != "auto" and (strategy in STRATEGIES_OF_8_BITS) != bool(compute):
        raise ValueError(
            f"strategy={strategy!r} with compute_dtype={'torch.' + compute if compute else None}; "
            f"only {' and '.join(STRATEGIES_OF_8_BITS)} compute in torch.float8_e4m3fn: leave strategy "
            f"out, or give both"
        )
    if max_scratch_bytes is not None and max_scratch_bytes <= 0:
        raise ValueError(
            f"max_scratch_bytes={max_scratch_bytes}; it must be a positive number, or None for the default"
        )
