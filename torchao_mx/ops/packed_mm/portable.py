"""The product with a packed weight in one kernel, which decodes in registers inside the GEMM's loop.

::

    y[i] = x[token of i] W_e^T (or W_e) + scaling * h[i] up_e^T + bias_e      rows i of expert e, see moe/groups.py

A tile of y is computed transposed, W on the left: a tensor core's left operand may come from registers, where
the decoded values are, and few rows of x (16) fill its right side. The layout of everything here follows from
that. Registers hold *pairs* of values, neighbours along the reduced axis. A thread decodes the pairs of a
word that it has loaded, and the words are dealt out so that its tensor core needs just those pairs from it:

- ``x W^T`` reduces along the packed rows. A word of eight codes is four pairs. A thread takes a quarter of
  the tile's columns, four per row, where the tensor core would deal out RUN neighbours at a time. A sum may
  be reordered, so both operands are permuted.
- ``x W`` reduces over rows. Words of four codes, in two neighbouring rows, are four pairs of four columns of
  y. The tile's columns are permuted, and put back in order when the sums are stored.

None of the permutations changes a result, whatever layout Triton chooses; they only affect the cost. In MXFP4
and bf16 a pair takes six instructions, two of them multiplications, and the whole loop takes 4.6 (x W^T) or
5.6 (x W) per element in Hopper's machine code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from torchao_mx.formats import MXFP4
from torchao_mx.ops.core.launch import (
    DOT_DTYPES,
    bytes_of,
    capability,
    cdiv,
    format_on,
    in_words,
    launched,
    on_device_of,
    per_tensor_kind,
)
from torchao_mx.ops.core.operands import Added, Packed, Rows
from torchao_mx.ops.core.tiles import PORTABLE_BAND, PORTABLE_MAX_RANKS, portable_tile, rank_tile
from torchao_mx.ops.moe import groups
from torchao_mx.ops.moe.gather import with_unit_rows
from torchao_mx.ops.quantization import tile as _tile

BAND = tl.constexpr(PORTABLE_BAND)


class _Strides(NamedTuple):
    """The strides of experts, rows, columns and ranks; q's count WORD_UNIT words."""

    x_row: int
    q_expert: int
    q_row: int
    s_expert: int
    s_row: int
    up_expert: int
    up_column: int
    up_rank: int
    bias_expert: int
    bias_column: int


@triton.jit
def _bf16_pairs(codes, scales):
    """Multiply pairs of e2m1 values by pairs of bf16 scales; codes in the top four bits of both halves.

    Sign, exponent and mantissa bits in bf16's positions are the value times 2**-126, subnormals included.
    """
    bits = (codes & -0x7FFF8000) | ((codes >> 6) & 0x01C001C0)
    pairs = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 factor, zero;
        mov.b32 factor, 0x7E807E80;
        mov.b32 zero, 0x80008000;
        fma.rn.bf16x2 factor, $1, factor, zero;
        fma.rn.bf16x2 $0, factor, $2, zero;
        }
        """,
        "=r,r,r",
        [bits, scales],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low, high


@triton.jit
def _codes_of_byte(word, SELECTOR: tl.constexpr):
    """Move both codes of one byte of ``word`` to the top of the two halves; lower bits are undefined."""
    asm: tl.constexpr = "prmt.b32 $0, $1, $2, " + SELECTOR + ";"
    return tl.inline_asm_elementwise(
        asm, "=r,r,r", [word << 4, word], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _bf16_scales(low, high):
    """Convert pairs of E8M0 bytes (int32) to pairs of bf16 scales in a word."""
    bytes = low | (high << 16)
    # 0 is 2**-127, a subnormal, and 255 is NaN: both have the mantissa's upper bit set.
    special = 0x01000100 - ((bytes + 0x00010001) & 0x00FE00FE)
    return (bytes << 7) + ((special >> 2) & 0x00400040)


@triton.jit
def _pairs(
    low,
    high,
    low_scale,
    high_scale,
    PAIR: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Return the (first, second) values of pair PAIR of each word; :func:`_decode` prepares the arguments."""
    BITS: tl.constexpr = FORMAT.elem_bits
    MASK: tl.constexpr = (1 << BITS) - 1
    SHIFT: tl.constexpr = PAIR * BITS * (2 if ALONG_ROWS else 1)
    if PACKED:
        if ALONG_ROWS:
            SELECTORS: tl.constexpr = ("0x4400", "0x5511", "0x6622", "0x7733")
            codes = _codes_of_byte(low, SELECTORS[PAIR])
        else:
            codes = low << (12 - 4 * PAIR)
        first, second = _bf16_pairs(codes, low_scale)
    else:
        first = ((low >> SHIFT) & MASK).to(tl.int32)
        first = _tile.decode(first, FORMAT) * low_scale
        second = ((high >> SHIFT) & MASK).to(tl.int32)
        second = _tile.decode(second, FORMAT) * high_scale
    return first.to(DOT_DTYPE), second.to(DOT_DTYPE)


@triton.jit
def _of_row_pairs(t):
    """Split ``t [A, C]`` into its even and its odd rows."""
    return tl.split(t.reshape(t.shape[0] // 2, 2, t.shape[1]).permute(0, 2, 1))


@triton.jit
def _spread(t, COLUMNS: tl.constexpr):
    """Repeat each column of ``t [A, B]``, to COLUMNS columns in all."""
    A: tl.constexpr = t.shape[0]
    B: tl.constexpr = t.shape[1]
    return t[:, :, None].broadcast_to((A, B, COLUMNS // B)).reshape(A, COLUMNS)


@triton.jit
def _decode(
    word,
    byte,
    pts,
    ALONG_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Decode ``word [A, C]`` under the scale bytes ``[A, blocks]``, in pairs along the reduced axis.

    ALONG_ROWS: ``[A, C, 4, 2]``, words of eight codes, pair i of a word being its codes 2i and 2i + 1.
    Otherwise: ``[A / 2, C, 4, 2]``, words of four, pair i being code i of a row and of the next row.
    """
    C: tl.constexpr = word.shape[1]
    byte = byte.to(tl.int32)
    if ALONG_ROWS:
        low, high = word, word >> FORMAT.elem_bits
        low_byte, high_byte = byte, byte
    else:
        low, high = _of_row_pairs(word)
        low_byte, high_byte = _of_row_pairs(byte)
        if PACKED:
            low = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    if PACKED:
        low_scale = _spread(_bf16_scales(low_byte, high_byte), C)
        high_scale = low_scale
    else:
        low_scale = _spread(_tile.scale_value(low_byte, pts, FORMAT), C)
        high_scale = _spread(_tile.scale_value(high_byte, pts, FORMAT), C)
    a0, b0 = _pairs(low, high, low_scale, high_scale, 0, ALONG_ROWS, PACKED, DOT_DTYPE, FORMAT)
    a1, b1 = _pairs(low, high, low_scale, high_scale, 1, ALONG_ROWS, PACKED, DOT_DTYPE, FORMAT)
    a2, b2 = _pairs(low, high, low_scale, high_scale, 2, ALONG_ROWS, PACKED, DOT_DTYPE, FORMAT)
    a3, b3 = _pairs(low, high, low_scale, high_scale, 3, ALONG_ROWS, PACKED, DOT_DTYPE, FORMAT)
    first = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    second = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    return tl.join(first, second).reshape(low.shape[0], C, 4, 2)


@triton.jit
def _deal_reduced(t, RUN: tl.constexpr):
    """Permute the four quarters of ``t [A, B]`` along B: runs of the four quarters in turn."""
    if RUN > 0:
        A: tl.constexpr = t.shape[0]
        B: tl.constexpr = t.shape[1]
        t = t.reshape(A, 4, B // 4 // RUN, RUN).permute(0, 2, 1, 3).reshape(A, B)
    return t


@triton.jit
def _deal_columns(t, RUN: tl.constexpr):
    """Move rows 32 w + 4 g + 2 r + h of ``t [A, B]`` to 16 (w + A / 32 * r) + 8 h + g, if RUN > 0.

    Warp w's tensor core has rows 8 h + g of 16, and a thread has one g of them: the four columns of a word.
    """
    if RUN > 0:
        A: tl.constexpr = t.shape[0]
        B: tl.constexpr = t.shape[1]
        t = t.reshape(A // 32, 8, 2, 2, B).permute(2, 0, 3, 1, 4).reshape(A, B)
    return t


@triton.jit
def _collect_columns(t, RUN: tl.constexpr):
    """Invert :func:`_deal_columns`."""
    if RUN > 0:
        A: tl.constexpr = t.shape[0]
        B: tl.constexpr = t.shape[1]
        t = t.reshape(2, A // 32, 2, 8, B).permute(1, 3, 0, 2, 4).reshape(A, B)
    return t


@triton.jit
def _tile_of_program(row_tiles, column_tiles):
    """Return (row tile, column tile): BAND row tiles per column of tiles, one column after another."""
    band = tl.program_id(0) // (BAND * column_tiles)
    index = tl.program_id(0) - band * (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    return band * BAND + index % height, index // height


@triton.jit
def _load_scales(
    ptrs,
    n,
    block,
    left,
    row_blocks,
    ALONG_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Load scale bytes ``[n, block]`` with ``left`` elements left along the reduced axis; zeros beyond."""
    if WHOLE:
        mask = left > 0
    elif ALONG_ROWS:
        mask = (block < left // BLOCK)[None, :]
    else:
        mask = (n < left)[:, None] & (block < row_blocks)[None, :]
    return tl.load(ptrs, mask=mask, other=0)


@launched
@triton.jit(do_not_specialize=["n_rows", "n_tokens", "row_tiles", "E", "top_k"])
def _fused_kernel(
    x_ptr,
    weight,
    rows,
    added,
    y_ptr,
    scaling,
    n_rows,
    n_tokens,
    row_tiles,
    weight_size,
    E,
    top_k,
    rank,
    strides,
    TRANSPOSE_WEIGHT: tl.constexpr,
    E_SPAN: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    TILE_RANK: tl.constexpr,
    WORD_UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Compute a :class:`PortableTile` of y; zeros in unassigned rows.

    ``strides`` are :class:`_Strides`. WHOLE: the tiles divide the weight. TILE_RANK 0: no adapters.
    """
    q_ptr, s_ptr, pts_ptr = weight
    offs_ptr, order_ptr = rows
    h_ptr, up_ptr, bias_ptr = added
    N, K = weight_size
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    REDUCED: tl.constexpr = TILE.reduced
    RUN: tl.constexpr = TILE.run
    BLOCK: tl.constexpr = FORMAT.block_size
    GROUPED: tl.constexpr = offs_ptr is not None
    GATHERED: tl.constexpr = order_ptr is not None
    row_blocks = K // BLOCK
    if TRANSPOSE_WEIGHT:
        n_columns = N
        n_reduced = row_blocks * BLOCK  # K, in a form known to be whole blocks
    else:
        n_columns = K
        n_reduced = N
    column_tiles = tl.cdiv(n_columns, COLUMNS)
    row_tile, column_tile = _tile_of_program(row_tiles, column_tiles)
    expert, first, end = groups.tile_rows(offs_ptr, n_rows, row_tile, E, E_SPAN, ROWS, GROUPED)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    inside = row < end
    column0 = column_tile * COLUMNS
    column = column0 + tl.arange(0, COLUMNS)
    y_ptrs = y_ptr + row.to(tl.int64)[:, None] * n_columns + column[None, :]
    y_mask = inside[:, None] & (column < n_columns)[None, :]
    if expert >= E:
        tl.store(y_ptrs, tl.zeros((ROWS, COLUMNS), y_ptr.dtype.element_ty), mask=y_mask)
        return
    expert = tl.cast(expert, tl.int64)

    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    if TILE_RANK > 0:
        h_ptr += row.to(tl.int64)[:, None] * rank
        up_ptr += expert * strides.up_expert + column.to(tl.int64)[:, None] * strides.up_column
        for rank0 in tl.range(0, rank, TILE_RANK, num_stages=1):
            r = rank0 + tl.arange(0, TILE_RANK)
            there = (r < rank)[None, :]
            h = tl.load(h_ptr + r[None, :], mask=inside[:, None] & there, other=0.0)
            up_mask = (column < n_columns)[:, None] & there
            up = tl.load(up_ptr + r[None, :] * strides.up_rank, mask=up_mask, other=0.0).to(
                DOT_DTYPE
            )
            if not TRANSPOSE_WEIGHT:
                up = _deal_columns(up, RUN)
            acc = tl.dot(up, tl.trans(h.to(DOT_DTYPE)), acc, input_precision="ieee")
        acc *= scaling

    PER_WORD: tl.constexpr = 8 if TRANSPOSE_WEIGHT else 4
    step = tl.arange(0, REDUCED)
    if TRANSPOSE_WEIGHT:
        n = tl.minimum(column, N - 1)  # any row will do for columns that are not stored
        word = tl.arange(0, REDUCED // PER_WORD)
        block = tl.arange(0, REDUCED // BLOCK)
    else:
        n = step
        word = column0 // PER_WORD + tl.arange(0, COLUMNS // PER_WORD)
        block = column0 // BLOCK + tl.arange(0, COLUMNS // BLOCK)
    token = groups.token_of(order_ptr, row, inside, top_k, n_tokens, GATHERED)
    token = tl.minimum(token, n_tokens - 1)  # the same for rows
    x_ptrs = x_ptr + token[:, None] * strides.x_row + step[None, :]
    q_ptrs = q_ptr + expert * (strides.q_expert * WORD_UNIT)
    q_ptrs += n.to(tl.int64)[:, None] * (strides.q_row * WORD_UNIT) + word[None, :]
    s_ptrs = s_ptr + expert * strides.s_expert
    s_ptrs += n.to(tl.int64)[:, None] * strides.s_row + block[None, :]
    pts = _tile.load_per_tensor_scale(pts_ptr, expert, PER_TENSOR)
    byte = _load_scales(s_ptrs, n, block, n_reduced, row_blocks, TRANSPOSE_WEIGHT, WHOLE, BLOCK)
    for start in range(0, n_reduced, REDUCED):
        left = n_reduced - start
        if WHOLE:
            x = tl.load(x_ptrs)
            words = tl.load(q_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(step < left)[None, :], other=0.0)
            if TRANSPOSE_WEIGHT:
                mask = (word < left // PER_WORD)[None, :]
            else:
                mask = (n < left)[:, None] & (word < row_blocks * (BLOCK // PER_WORD))[None, :]
            words = tl.load(q_ptrs, mask=mask, other=0)
        x_ptrs += REDUCED
        if TRANSPOSE_WEIGHT:
            q_ptrs += REDUCED // PER_WORD
            s_ptrs += REDUCED // BLOCK
        else:
            q_ptrs += tl.cast(strides.q_row, tl.int64) * (WORD_UNIT * REDUCED)
            s_ptrs += tl.cast(strides.s_row, tl.int64) * REDUCED
        # A byte is too narrow for the asynchronous copies that load x and the words: load one step ahead.
        next_byte = _load_scales(
            s_ptrs, n, block, left - REDUCED, row_blocks, TRANSPOSE_WEIGHT, WHOLE, BLOCK
        )
        w = _decode(words, byte, pts, TRANSPOSE_WEIGHT, PACKED, DOT_DTYPE, FORMAT)
        x = x.to(DOT_DTYPE)
        if TRANSPOSE_WEIGHT:
            w = _deal_reduced(w.reshape(COLUMNS, REDUCED), RUN)
            x = _deal_reduced(x, RUN)
        else:
            w = _deal_columns(w.permute(1, 2, 0, 3).reshape(COLUMNS, REDUCED), RUN)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        byte = next_byte

    if not TRANSPOSE_WEIGHT:
        acc = _collect_columns(acc, RUN)
    y = tl.trans(acc)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * strides.bias_expert + column * strides.bias_column
        bias = tl.load(bias_ptrs, mask=column < n_columns, other=0.0)
        y += bias.to(tl.float32)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


def fused_product(
    x: torch.Tensor, w: Packed, rows: Rows, transpose_weight: bool, added: Added
) -> torch.Tensor:
    """Return ``y [n_rows, N]`` (``[n_rows, K]`` without ``transpose_weight``), in x's dtype; see the head.

    A weight is element * scale, rounded once to x's dtype, as in :func:`torchao_mx.ops.dequantize`. Sums are
    in fp32. Rows after ``offs[-1]`` are zero.

    Args:
        x: ``[n_rows, K]`` (``[n_rows, N]``), or ``[n_rows / top_k, ..]`` with an ``order``; bfloat16, float16
            or float32.
        w: ``[E, N, K]``, or without E for a dense product; a per-tensor scale is 0-d or ``[E, 1, 1]``.
        rows: on x's device, ``offs`` and ``order`` int32.
        transpose_weight: reduce over K, the packed axis; otherwise over N.
        added: without E for a dense product; a bias may always be ``[columns of y]``.
    """
    qdata, scale, per_tensor_scale, fmt = w
    offs, order, top_k, n_rows = rows
    h, up, scaling, bias = added
    n, k = w.n, w.k
    columns, reduced = (n, k) if transpose_weight else (k, n)
    y = x.new_empty((n_rows, columns))
    if y.numel() == 0:
        return y
    x = with_unit_rows(x)
    n_groups = 0 if offs is None else offs.shape[0]
    major = capability(x.device.index)[0] if x.is_cuda else 0
    packed = fmt == MXFP4 and x.dtype == torch.bfloat16 and x.is_cuda
    tile = portable_tile(n_rows, n_groups, x.dtype, packed, transpose_weight, major)
    row_tiles = groups.max_tiles(n_rows, n_groups, tile.rows)
    rank = 0 if h is None else h.shape[1]
    # Loads wider than 8 bytes would keep Triton (3.6, 3.7) from decoding in the layout of the product.
    words, word_unit = _words(
        qdata, fmt.elem_bits * (8 if transpose_weight else 4) // 8, 8 if transpose_weight else 16
    )
    scale = bytes_of(scale)
    scale = scale if scale.stride(-1) == 1 else scale.contiguous()
    whole = reduced % tile.reduced == 0 and (transpose_weight or columns % tile.columns == 0)
    strides = _Strides(
        x.stride(0),
        _expert_stride(words, 3) // word_unit,
        words.stride(-2) // word_unit,
        _expert_stride(scale, 3),
        scale.stride(-2),
        _expert_stride(up, 3),
        *_last_strides(up, 2),
        _expert_stride(bias, 2),
        *_last_strides(bias, 1),
    )
    dot_dtype = DOT_DTYPES[x.dtype] if x.is_cuda else tl.float32  # the only one in the interpreter
    with on_device_of(x):
        _fused_kernel[(row_tiles * cdiv(columns, tile.columns),)](
            x,
            (words, scale, per_tensor_scale),
            (offs, order),
            (h, up, bias),
            y,
            scaling,
            n_rows,
            x.shape[0],
            row_tiles,
            (n, k),
            max(1, n_groups),
            top_k,
            rank,
            strides,
            TRANSPOSE_WEIGHT=transpose_weight,
            E_SPAN=groups.span_of(offs),
            PER_TENSOR=per_tensor_kind(per_tensor_scale),
            TILE_RANK=0 if rank == 0 else rank_tile(rank, PORTABLE_MAX_RANKS),
            WORD_UNIT=word_unit,
            WHOLE=whole,
            PACKED=packed,
            DOT_DTYPE=dot_dtype,
            TILE=tile,
            FORMAT=format_on(x.device, fmt),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y


def _words(qdata: torch.Tensor, itemsize: int, most: int) -> tuple[torch.Tensor, int]:
    """Return ``qdata`` as integers of ``itemsize`` bytes, and how many of them one load may take.

    One load takes ``most`` bytes if all rows begin at multiples of that. ``qdata`` is copied if a view along
    K begins inside a word, or if its rows are not whole words apart.
    """
    q = in_words(qdata, itemsize)
    starts = (q.data_ptr(), *q.stride()[:-1])
    unit = itemsize if any(start % most for start in starts) else most
    return q.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]), unit // itemsize


def _expert_stride(t: torch.Tensor | None, dims: int) -> int:
    """Return the stride of the leading expert axis of ``t``, which it has if it has ``dims`` axes."""
    return t.stride(0) if t is not None and t.dim() == dims else 0


def _last_strides(t: torch.Tensor | None, n: int) -> tuple[int, ...]:
    return (0,) * n if t is None else t.stride()[-n:]
