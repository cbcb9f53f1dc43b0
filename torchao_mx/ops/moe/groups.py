"""Rows of grouped operands: a tile's expert, an expert's rows, and a row's token.

Expert e owns the rows ``offs[e - 1] : offs[e]`` (from 0). A group E after the experts, the unassigned rows,
holds the rows from ``offs[-1]`` on, which kernels fill with zeros. The offsets are read on the device and
there clamped to ``[0, n_rows]`` and made non-decreasing: even bad offsets then partition the rows, so no
kernel leaves its tensors and every row is written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from torchao_mx.ops.core.launch import cdiv, next_power_of_2


def max_tiles(n_rows: int, n_groups: int, tile: int) -> int:
    """Return the largest number of tiles in :func:`tile_rows`, as a grid; ``n_groups=0`` for ungrouped rows.

    Each group, the unassigned rows included, may end in a tile of a single row.
    """
    return min(n_rows, (n_rows + (n_groups + 1) * (tile - 1)) // tile)


def span_of(offs: torch.Tensor | None) -> int:
    """Return E_SPAN, the power of two that covers the groups."""
    return 1 if offs is None else next_power_of_2(offs.shape[0])


def completed_groups(
    offs: torch.Tensor, n_rows: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Align groups of rows to whole blocks: ``(index [P], ends [E])``, both int32.

    ``index[i]`` is the row in place i, or -1 where a place pads a group's last block or lies after the last
    group; ``ends`` are the groups' end offsets in ``index``. P depends on the shapes alone.

    Args:
        offs: int32 ``[E]`` end offsets of the groups among ``n_rows`` rows.
    """
    n_groups = offs.shape[0]
    starts = F.pad(offs[:-1], (1, 0))
    lengths = (offs - starts + block_size - 1) // block_size * block_size
    ends = lengths.cumsum(0, dtype=torch.int32)
    n_places = (n_rows + n_groups * (block_size - 1)) // block_size * block_size
    place = torch.arange(n_places, dtype=torch.int32, device=offs.device)
    group = torch.searchsorted(ends, place, right=True)
    is_owned, group = group < n_groups, group.clamp(max=n_groups - 1)
    row = place - (ends - lengths)[group] + starts[group]
    return row.where(is_owned & (row < offs[group]), -1), ends


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _load_ends(offs_ptr, index, n_rows, E):
    """Load the clamped ends of the groups ``index``: 0 before the first group, n_rows after the last."""
    ends = tl.load(offs_ptr + index, mask=(index >= 0) & (index < E), other=0)
    ends = tl.where(index >= E, n_rows, ends)
    return tl.minimum(tl.maximum(ends, 0), n_rows)


@triton.jit
def tile_rows(
    offs_ptr, n_rows, tile, E, E_SPAN: tl.constexpr, TILE: tl.constexpr, GROUPED: tl.constexpr
):
    """Return (group, first row, end of the group's rows) of tile number ``tile``, of at most TILE rows.

    Tiles are numbered group by group and never cross groups. The group is E for unassigned rows; after the
    last tile ``first >= end``. Without GROUPED all rows are group 0, and nothing is loaded.
    """
    if GROUPED:
        index = tl.arange(0, E_SPAN)
        ends = tl.associative_scan(_load_ends(offs_ptr, index, n_rows, E), 0, _larger)
        starts = tl.associative_scan(_load_ends(offs_ptr, index - 1, n_rows, E), 0, _larger)
        tiles = tl.cumsum(tl.cdiv(ends - starts, TILE), 0)
        passed = (tiles <= tile) & (index < E)
        group = tl.sum(passed.to(tl.int32), 0)
        start = tl.max(tl.where(passed, ends, 0), 0)
        end = tl.min(tl.where(passed, n_rows, ends), 0)
        first = start + (tile - tl.max(tl.where(passed, tiles, 0), 0)) * TILE
    else:
        group = 0
        first = tile * TILE
        end = n_rows
    return group, first, end


def max_slots(n_rows: int, n_groups: int, tile: int) -> int:
    """Return the number of slots of :func:`slot_rows`, as a grid; ``n_groups=0`` for ungrouped rows."""
    return cdiv(n_rows, tile) if n_groups == 0 else n_groups + n_rows // tile + 1


@triton.jit
def slot_rows(
    offs_ptr, n_rows, slot, E, E_SPAN: tl.constexpr, TILE: tl.constexpr, GROUPED: tl.constexpr
):
    """:func:`tile_rows` for ascending offsets, with one reduction instead of its scans.

    The tiles of group e have the slots from ``e + start // TILE`` on. The slots suffice and are in order; in
    empty slots ``first >= end``. E_SPAN covers the groups and the unassigned rows. Offsets that do not ascend
    omit or repeat rows, but never name one outside ``[0, n_rows)``.
    """
    if GROUPED:
        index = tl.arange(0, E_SPAN)
        start = tl.load(offs_ptr + index - 1, mask=(index > 0) & (index <= E), other=0)
        passed = (index + start // TILE <= slot) & (index <= E)
        group = tl.maximum(tl.sum(passed.to(tl.int32), 0) - 1, 0)
        first = tl.load(offs_ptr + group - 1, mask=group > 0, other=0)
        end = tl.load(offs_ptr + group, mask=group < E, other=n_rows)
        first = tl.minimum(tl.maximum(first, 0), n_rows)
        end = tl.minimum(end, n_rows)
        step = slot - group - first // TILE
        first = tl.where(step < 0, end, first + step * TILE)
    else:
        group = 0
        first = slot * TILE
        end = n_rows
    return group, first, end


@triton.jit
def group_rows(offs_ptr, n_rows, group, E, E_SPAN: tl.constexpr, GROUPED: tl.constexpr):
    """Return (first row, end) of an expert's rows; all rows without GROUPED."""
    if GROUPED:
        index = tl.arange(0, E_SPAN)
        ends = tl.where(index <= group, _load_ends(offs_ptr, index, n_rows, E), 0)
        start = tl.max(tl.where(index < group, ends, 0), 0)
        end = tl.max(ends, 0)
    else:
        start = 0
        end = n_rows
    return start, end


@triton.jit
def has_rows(offs_ptr, group, inside):
    """Whether a group (or each of a tensor of groups) owns rows; empty groups need no decoding."""
    start = tl.load(offs_ptr + group - 1, mask=inside & (group > 0), other=0)
    return tl.load(offs_ptr + group, mask=inside, other=0) > start


@triton.jit
def token_of(order_ptr, row, inside, top_k, n_tokens, GATHERED: tl.constexpr):
    """Return the rows of x (int64) that grouped rows read: ``order[row] // top_k``, or the rows themselves.

    They are clamped to x's rows, so that a bad order reads no foreign memory.
    """
    if GATHERED:
        token = tl.load(order_ptr + row, mask=inside, other=0) // top_k
        token = tl.minimum(tl.maximum(token, 0), n_tokens - 1)
    else:
        token = row
    return token.to(tl.int64)
