"""The tiles of every kernel, each with the measurement that chose it, or a note that there is none.

A tile is a NamedTuple that its kernel takes as the constexpr ``TILE``, or that its launcher unpacks. A tile
that depends on sizes, dtypes or the GPU is a pure function of them: the same call always has the same tile,
so results that depend on summation order are reproducible. Nothing is searched at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchao_mx.ops.core.launch import next_power_of_2


class Run(NamedTuple):
    """A tile along one axis; its comment gives the unit."""

    size: int
    warps: int


class Plane(NamedTuple):
    """A tile of rows (or blocks of rows) and columns."""

    m: int
    k: int
    warps: int = 4


# --- quantization ---------------------------------------------------------------------------------

# Fastest on an H200 for 8192 x 8192 bf16 (benchmarks/kernels/quantize.py).
QUANTIZE_ROWS = Run(2048, warps=2)  # elements
QUANTIZE_COLUMNS = Plane(2, 32, warps=1)  # blocks by columns; for bf16 pairs, by pairs of columns
DEQUANTIZE_ROWS = Run(256, warps=4)  # words of eight elements
DEQUANTIZE_COLUMNS = Plane(64, 64, warps=4)
FAKE_QUANTIZE_ROWS = Run(64, warps=4)  # blocks
FAKE_QUANTIZE_COLUMNS = Plane(1, 128, warps=2)  # blocks by columns
# Not measured against alternatives.
AMAX = Run(8192, warps=8)  # elements
AMAX_PROGRAMS_PER_MULTIPROCESSOR = 4


class BothTile(NamedTuple):
    """A tile that is quantized both ways; ``stack`` is that of ``both_tile.rows_in_order``."""

    m: int
    k: int
    warps: int
    stack: int
    max_registers: int | None = None


def quantize_both_tile(forms: Sequence[str], row_elem_bits: int, is_random: bool) -> BothTile:
    """The fastest on an H200 (benchmarks/kernels/quantize_both.py --sweep); multiples of every block size."""
    if is_random:
        return BothTile(32, 64, warps=2, stack=1, max_registers=80)
    if "columns" not in forms:
        both_ways = "column_values" in forms
        return BothTile(32, 128, warps=2 if both_ways else 4, stack=2)
    if "rows" not in forms:
        return BothTile(128, 64, warps=4, stack=2)
    if row_elem_bits == 8:  # so a thread has 16 columns
        return BothTile(128, 64, warps=4, stack=1)
    return BothTile(128, 64, warps=4, stack=2, max_registers=96)


# --- moe ------------------------------------------------------------------------------------------

# A thread has 16 bytes of each row in flight. Not measured.
SUM_ROWS = Run(1024, warps=4)  # columns; also for combine's backward
INVERSE = Run(1024, warps=4)  # rows; not measured


class SwigluTile(NamedTuple):
    """The rows and columns of one step of a program, and its number of steps along the rows."""

    rows: int
    columns: int
    warps: int
    steps: int


# A program finds its expert and loads the bias once per rows * steps rows. For 65,536 rows of 2 x 2,880
# columns, gpt-oss's form with biases thus reaches 93 / 95 % of the copy bandwidth (interleaved 83 / 94 %);
# one step of 8 rows of 256 columns reaches 73 / 84 % (68 / 83 %).
SWIGLU = SwigluTile(4, 128, warps=2, steps=4)


class NarrowTile(NamedTuple):
    """Rows, columns of the wide operand, ranks, and the number of such tiles in flight."""

    rows: int
    columns: int
    ranks: int
    stages: int
    warps: int


# Chosen to keep at least 50 KB in flight on each multiprocessor of an H200. Not measured.
SHARED_BYTES = 96 * 1024  # for a program's pipeline: available on every GPU since Ampere
MAX_STAGES = 4
MAX_RANKS = 128  # per tile; higher ranks take several programs, which share the wide operand in L2
LOW_RANK_MAX_ROWS, LOW_RANK_COLUMNS = 128, 256
# Keyed by the largest average group in rows: rows, columns, stages. Small groups need many programs at once
# more than deep pipelines: their output has as many bytes as their rows.
GRAM_TILES = ((32, 32, 256, 2), (256, 64, 128, 2), (2**31, 64, 128, 4))
GROUP_SUM = Plane(32, 128, warps=4)
ADD_SPLITS = Run(1024, warps=4)  # elements


def low_rank_tile(
    n_rows: int, n_groups: int, r: int, x_bytes: int, down_bytes: int, multiprocessors: int
) -> NarrowTile:
    """Choose a tall tile, since each tile of rows reads its expert's whole adapter, but no taller than two
    average groups, nor so tall that multiprocessors stay idle.
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
    """Choose from GRAM_TILES; fewer columns or stages where accumulators or shared memory would not fit."""
    ranks = rank_tile(r)
    rows, columns, stages = next(tile for most, *tile in GRAM_TILES if n_rows <= most * n_groups)
    columns = min(columns, 256 if ranks < 64 else 128) // (m_bytes // 2)
    stages = min(stages, SHARED_BYTES // (rows * (columns + ranks) * m_bytes))
    return NarrowTile(rows, columns, ranks, stages, warps=8 if columns * ranks > 8192 else 4)


def rank_tile(r: int, most: int = MAX_RANKS) -> int:
    """Return the ranks per tile: r rounded up to a power of two that tensor cores take, at most ``most``."""
    return min(most, max(16, next_power_of_2(r)))


# --- packed_mm, on every GPU ----------------------------------------------------------------------


class PortableTile(NamedTuple):
    """Rows of x, columns of y, the step along the reduced axis, and the pipelining of the kernel.

    ``run`` is how many neighbours a thread gives to one instruction. On Blackwell (10) decoded tiles go
    through tensor memory, and ``run`` does not apply.
    """

    rows: int
    columns: int
    reduced: int
    run: int
    num_warps: int
    num_stages: int


# By the GPU's major compute capability and the largest average group, in rows, that a tile serves. Chosen
# from machine code (registers, instructions). Not measured.
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
# Plain fp32 instructions. On compute capability 10, Triton (3.6, 3.7) multiplies tiles of 64 columns in tf32
# in spite of the requested input_precision.
PORTABLE_FP32_TILE = PortableTile(64, 32, 32, 0, num_warps=4, num_stages=2)
PORTABLE_MAX_RANKS = 64
# Row tiles that run side by side: tiles of one expert share its weights in L2.
PORTABLE_BAND = 8


def portable_tile(
    n_rows: int, n_groups: int, dtype: torch.dtype, packed: bool, transpose_weight: bool, major: int
) -> PortableTile:
    """Choose by average rows per group: most groups then are one tile, whose weights are decoded once."""
    if dtype == torch.float32 and major > 0:
        return PORTABLE_FP32_TILE
    average = n_rows / max(1, n_groups)
    has_wide_mma = major in (9, 10)
    table = PORTABLE_TILES[major if has_wide_mma else 8]
    tile = next(tile for most, tile in table if average <= most)
    # The rest keeps a thread's values in its registers.
    if not packed:
        rows = min(tile.rows, 64 if has_wide_mma else 32)
        return tile._replace(rows=rows, reduced=64, num_warps=4)
    if major == 9 and transpose_weight and tile.rows == 128:
        return tile._replace(num_warps=8)
    return tile


class AddTile(NamedTuple):
    """A tile, the number of tiles per program along the columns, and the maximum rank."""

    rows: int
    columns: int
    steps: int
    ranks: int


# 3.0 TB/s of an H200's 4.2; tiles of twice the rows reach 2.8, with twice the columns too 1.3.
ADD = AddTile(32, 128, steps=8, ranks=32)
# Not measured against alternatives.
ZERO_ROWS = Plane(16, 1024)
WIDE_ROWS = Plane(4, 1024)


# --- packed_mm, in 8 bits -------------------------------------------------------------------------


class FlaggedTile(NamedTuple):
    """Rows, columns and reduced elements of a tile, (expert, columns) pairs per program, and maximum rank."""

    m: int
    n: int
    k: int
    pairs: int = 1
    rank: int = 0


# Not measured against alternatives.
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
    """Rows of a tile, rows of W, stages, whether W is two operands, and registers per thread."""

    rows: int
    columns: int
    stages: int
    two_operands: bool
    max_registers: int | None


class BackwardTile(NamedTuple):
    """Rows of a tile, stages, whether W is two times two operands, and registers per thread."""

    rows: int
    stages: int
    two_operands: bool
    max_registers: int | None


class Fp8Tile(NamedTuple):
    """Rows of a tile, columns (backward: 32 per warp), stages, operands, warps, and registers per thread."""

    rows: int
    columns: int
    stages: int
    operands: int
    warps: int
    max_registers: int | None


def hopper_forward_tile(n_rows: int, n_groups: int) -> ForwardTile:
    """Choose as measured on an H200 (experts of 1024 x 2048, 5760 x 2880); ``n_groups=0``: a dense product.

    Groups differ in size: narrow tiles waste fewer rows, which outweighs decoding the weights more often.
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
