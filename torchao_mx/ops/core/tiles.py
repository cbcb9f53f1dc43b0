"""The tiles of every kernel, each with the measurement that chose it, or the word that there is none.

A tile is a NamedTuple, which its kernel takes as the constexpr ``TILE`` or its launcher takes apart. Where it depends
on sizes, dtypes or the GPU it is a function of those alone: the same call always has the same tile, and results that
depend on the order of their sums repeat. Nothing is searched at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchao_mx.ops.core.launch import next_power_of_2


class Run(NamedTuple):
    """A tile along one axis, in the unit that its row says."""

    size: int
    warps: int


class Plane(NamedTuple):
    """A tile of rows (or of blocks of rows) and columns."""

    m: int
    k: int
    warps: int = 4


# --- quantization ---------------------------------------------------------------------------------

# Fastest on an H200 for 8192 x 8192 bf16 (benchmarks/kernels/quantize.py).
QUANTIZE_ROWS = Run(2048, warps=2)  # elements
QUANTIZE_COLUMNS = Plane(2, 32, warps=1)  # blocks by columns; of bf16 pairs, by pairs of columns
DEQUANTIZE_ROWS = Run(256, warps=4)  # words of eight elements
DEQUANTIZE_COLUMNS = Plane(64, 64, warps=4)
FAKE_QUANTIZE_ROWS = Run(64, warps=4)  # blocks
FAKE_QUANTIZE_COLUMNS = Plane(1, 128, warps=2)  # blocks by columns
# Not measured against others.
AMAX = Run(8192, warps=8)  # elements
AMAX_PROGRAMS_PER_MULTIPROCESSOR = 4


class BothTile(NamedTuple):
    """A tile that is quantized both ways; ``stack`` as ``both_tile.rows_in_order`` has it."""

    m: int
    k: int
    warps: int
    stack: int
    max_registers: int | None = None


def quantize_both_tile(forms: Sequence[str], row_elem_bits: int, is_random: bool) -> BothTile:
    """The fastest on an H200 (benchmarks/kernels/quantize_both.py --sweep); of multiples of every block size."""
    if is_random:
        return BothTile(32, 64, warps=2, stack=1, max_registers=80)
    if "columns" not in forms:
        both_ways = "column_values" in forms
        return BothTile(32, 128, warps=2 if both_ways else 4, stack=2)
    if "rows" not in forms:
        return BothTile(128, 64, warps=4, stack=2)
    if row_elem_bits == 8:  # a thread then has 16 columns
        return BothTile(128, 64, warps=4, stack=1)
    return BothTile(128, 64, warps=4, stack=2, max_registers=96)


# --- moe ------------------------------------------------------------------------------------------

# A thread has 16 bytes of each row in flight; to be measured.
SUM_ROWS = Run(1024, warps=4)  # columns; also of combine's backward
INVERSE = Run(1024, warps=4)  # rows; to be measured


class SwigluTile(NamedTuple):
    """A step of a program, and how many such steps of rows it has."""

    rows: int
    columns: int
    warps: int
    steps: int


# A program finds its expert and loads the bias once for rows * steps rows. Of 65,536 rows of 2 x 2,880 columns,
# gpt-oss's form with biases reaches 93 / 95 % of the copy bandwidth so (interleaved 83 / 94 %), with one step of 8 rows
# of 256 columns 73 / 84 % (68 / 83 %).
SWIGLU = SwigluTile(4, 128, warps=2, steps=4)


class NarrowTile(NamedTuple):
    """Rows, columns of the wide operand, ranks, and how many such tiles are in flight."""

    rows: int
    columns: int
    ranks: int
    stages: int
    warps: int


# Chosen to have 50 KB and more in flight on each multiprocessor of an H200; to be measured.
SHARED_BYTES = 96 * 1024  # of a program's pipeline: what every GPU since Ampere has
MAX_STAGES = 4
MAX_RANKS = 128  # a tile's; higher ranks take several programs, which share the wide operand in L2
LOW_RANK_MAX_ROWS, LOW_RANK_COLUMNS = 128, 256
# Up to so many rows an average group: rows, columns, stages. Small groups want many programs at once more than
# deep pipelines: their output is as many bytes as their rows.
GRAM_TILES = ((32, 32, 256, 2), (256, 64, 128, 2), (2**31, 64, 128, 4))
GROUP_SUM = Plane(32, 128, warps=4)
ADD_SPLITS = Run(1024, warps=4)  # elements


def low_rank_tile(
    n_rows: int, n_groups: int, r: int, x_bytes: int, down_bytes: int, multiprocessors: int
) -> NarrowTile:
    """Tall, as each tile of rows reads all of its expert's adapter, but no taller than two average groups, nor so
    tall that multiprocessors go without.
    """
    ranks, rows, columns = rank_tile(r), LOW_RANK_MAX_ROWS, LOW_RANK_COLUMNS
    while rows > 16 and (
        rows * n_groups > 2 * n_rows or n_rows // rows + n_groups < multiprocessors
    ):
        rows //= 2
    while columns > 32 and 3 * columns * (rows * x_bytes + ranks * down_bytes) > SHARED_BYTES:
        columns //= 2
    stages = SHARED_BYTES // (columns * (rows * x_bytes + ranks * down_bytes))
    stages = max(2, min(MAX_STAGES, stages))
    return NarrowTile(rows, columns, ranks, stages, warps=8 if rows * ranks > 8192 else 4)


def gram_tile(n_rows: int, n_groups: int, r: int, m_bytes: int) -> NarrowTile:
    """Of GRAM_TILES; fewer columns or stages where accumulators or shared memory would not fit."""
    ranks = rank_tile(r)
    rows, columns, stages = next(tile for most, *tile in GRAM_TILES if n_rows <= most * n_groups)
    columns = min(columns, 256 if ranks < 64 else 128) // (m_bytes // 2)
    stages = min(stages, SHARED_BYTES // (rows * (columns + ranks) * m_bytes))
    return NarrowTile(rows, columns, ranks, stages, warps=8 if columns * ranks > 8192 else 4)


def rank_tile(r: int, most: int = MAX_RANKS) -> int:
    """Ranks of a tile: r up to the next power of two that a tensor core multiplies, at most ``most``."""
    return min(most, max(16, next_power_of_2(r)))


# --- packed_mm, on every GPU ----------------------------------------------------------------------


class PortableTile(NamedTuple):
    """Rows of x, columns of y, the step along the reduced axis, and how the kernel is pipelined.

    ``run`` is how many neighbours a thread gives to one instruction; on Blackwell (10) decoded tiles go through
    tensor memory and nothing is dealt out.
    """

    rows: int
    columns: int
    reduced: int
    run: int
    num_warps: int
    num_stages: int


# By the GPU's major compute capability, and the average rows of a group up to which a tile is taken. Chosen from
# machine code (registers, instructions), to be measured.
_MMA = (
    (8, PortableTile(16, 128, 64, 4, num_warps=4, num_stages=4)),
    (20, PortableTile(32, 128, 64, 4, num_warps=4, num_stages=4)),
    (80, PortableTile(64, 128, 64, 4, num_warps=4, num_stages=4)),
    (math.inf, PortableTile(128, 128, 64, 4, num_warps=8, num_stages=3)),
)
_WGMMA = (
    (8, PortableTile(16, 128, 64, 2, num_warps=4, num_stages=4)),
    (20, PortableTile(32, 128, 64, 2, num_warps=4, num_stages=4)),
    (80, PortableTile(64, 128, 128, 2, num_warps=4, num_stages=3)),
    (math.inf, PortableTile(128, 128, 64, 2, num_warps=4, num_stages=4)),
)
_TCGEN05 = tuple((average, tile._replace(run=0)) for average, tile in _WGMMA)
PORTABLE_TILES = {8: _MMA, 9: _WGMMA, 10: _TCGEN05}
# Plain fp32 instructions. Tiles of 64 columns Triton (3.6, 3.7) multiplies in tf32 on compute capability 10,
# in spite of the input_precision asked for.
PORTABLE_FP32_TILE = PortableTile(64, 32, 32, 0, num_warps=4, num_stages=2)
PORTABLE_MAX_RANKS = 64
# Row tiles that run side by side: an expert's share the weights that they read in L2.
PORTABLE_BAND = 8


def portable_tile(
    n_rows: int, n_groups: int, dtype: torch.dtype, packed: bool, transpose_weight: bool, major: int
) -> PortableTile:
    """By the average rows of a group: most groups are one tile then, whose weights are decoded once."""
    if dtype == torch.float32 and major > 0:
        return PORTABLE_FP32_TILE
    average = n_rows / max(1, n_groups)
    has_wide_mma = major in (9, 10)
    table = PORTABLE_TILES[major if has_wide_mma else 8]
    tile = next(tile for most, tile in table if average <= most)
    # What follows keeps a thread's values in its registers.
    if not packed:
        rows = min(tile.rows, 64 if has_wide_mma else 32)
        return tile._replace(rows=rows, reduced=64, num_warps=4)
    if major == 9 and transpose_weight and tile.rows == 128:
        return tile._replace(num_warps=8)
    return tile


class AddTile(NamedTuple):
    """A tile, how many of them along the columns a program has, and ranks at most."""

    rows: int
    columns: int
    steps: int
    ranks: int


# 3.0 TB/s of an H200's 4.2; tiles of twice the rows 2.8, of twice the columns too 1.3.
ADD = AddTile(32, 128, steps=8, ranks=32)
# Not measured against others.
ZERO_ROWS = Plane(16, 1024)
WIDE_ROWS = Plane(4, 1024)


# --- packed_mm, in 8 bits -------------------------------------------------------------------------


class FlaggedTile(NamedTuple):
    """Rows, columns and reduced elements of a tile, pairs of an expert and columns a program, and ranks at most."""

    m: int
    n: int
    k: int
    pairs: int = 1
    rank: int = 0


# Not measured against others.
FP8_QUANTIZE_ELEMENTS = 4096
FP8_GATHER = Plane(8, 256)  # rows by words
FP8_ROWS_WORDS = 1024
FP8_COLUMNS = Plane(128, 8)  # rows by blocks of columns
FP8_COLUMN_SCALES_BYTES, FP8_COLUMN_SCALES_BLOCKS = 32768, 32
FP8_LOWERED_BLOCKS = 1024
FP8_LOWERED_COLUMNS_BLOCKS = 32
FLAGGED_COLUMNS = FlaggedTile(128, 128, 64, pairs=8, rank=32)
FLAGGED_TILES = FlaggedTile(128, 128, 64)


# --- packed_mm, on Hopper -------------------------------------------------------------------------


class ForwardTile(NamedTuple):
    """Rows of a tile, rows of W, stages, whether W is two operands, and registers of a thread."""

    rows: int
    columns: int
    stages: int
    two_operands: bool
    max_registers: int | None


class BackwardTile(NamedTuple):
    """Rows of a tile, stages, whether W is two times two operands, and registers of a thread."""

    rows: int
    stages: int
    two_operands: bool
    max_registers: int | None


class Fp8Tile(NamedTuple):
    """Rows of a tile, columns (backward has 32 a warp), stages, operands, warps, and registers of a thread."""

    rows: int
    columns: int
    stages: int
    operands: int
    warps: int
    max_registers: int | None


def hopper_forward_tile(n_rows: int, n_groups: int) -> ForwardTile:
    """Measured on an H200 for experts of 1024 x 2048 and 5760 x 2880; ``n_groups=0`` for a dense product.

    Groups differ in size: narrow tiles waste less of them than they decode anew.
    """
    rows = n_rows / max(1, n_groups)
    if rows <= (12 if n_groups else 16):
        return ForwardTile(16, 128, 4, False, None)
    if rows <= (40 if n_groups else 32):
        return ForwardTile(32, 128, 4, False, 128)
    if n_groups and rows <= 80:
        return ForwardTile(32, 128, 4, False, 168)
    if rows <= 160:
        return ForwardTile(64, 128, 4, False, 168)
    return ForwardTile(128, 128, 4, True, None)


def hopper_backward_tile(n_rows: int, n_groups: int) -> BackwardTile:
    """Measured as :func:`hopper_forward_tile`."""
    if n_rows <= 40 * max(1, n_groups):
        return BackwardTile(32, 4, False, 168)
    return BackwardTile(64, 4, True, None)


def hopper_fp8_tile(n_rows: int, n_groups: int, transpose_weight: bool) -> Fp8Tile:
    """Measured as :func:`hopper_forward_tile`."""
    rows = n_rows / max(1, n_groups)
    if rows <= 12:
        return Fp8Tile(16, 128, 5, 1, 4, None)
    if rows <= 40:
        return Fp8Tile(32, 128, 5, 1, 4, None)
    if rows <= 160:
        return Fp8Tile(64, 128, 4, 1, 4, 168)
    if not transpose_weight:
        return Fp8Tile(128, 128, 3, 2, 4, None)
    if rows <= 1536:
        return Fp8Tile(128, 128, 4, 2, 4, None)
    return Fp8Tile(256, 128, 4, 2, 8, None)
