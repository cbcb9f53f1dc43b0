"""Hopper, few to some hundred rows per expert: ``y = x W``, the gradient's product, MXFP4 in registers.

As in the forward kernel, the weight tile is the left operand, ``y^T = W^T x^T``. Here it is reduced over the
rows n of W, while its words run along k. A wgmma register needs two neighbouring n of one k: the words of
rows n and n + 1 are interleaved by halves, so a code of the low half and the same code of the high half form
such a pair. Each of a word's eight columns k thus becomes a row of the operand, and n keeps its natural
order: x (the gradient) needs no permutation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from torchao_mx.ops.core.launch import launched
from torchao_mx.ops.packed_mm.hopper.tile import (
    WINDOW,
    decode_pairs,
    exact_scale,
    find_tile,
    max_u16x2,
    opaque,
    overflows,
    part_start,
    prmt,
    token_of,
    windowed_scale,
)
from torchao_mx.ops.quantization import tile


@launched
@triton.jit
def transpose_kernel(x_ptr, out_ptr, R, C, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Transpose pairs of bytes ``x [B, R, C]`` (uint16) to bytes ``out [B, 2 C, R]``."""
    batch, tile_r, tile_c = tile.tile_of_program(R, TILE_R, C, TILE_C)
    r = tile_r * TILE_R + tl.arange(0, TILE_R)
    c = tile_c * TILE_C + tl.arange(0, TILE_C)
    x_ptrs = x_ptr + (batch * R + r)[:, None] * C + c[None, :]
    x = tl.trans(tl.load(x_ptrs, mask=(r < R)[:, None] & (c < C)[None, :], other=0))
    out_ptrs = out_ptr + (batch * C + c)[:, None] * (2 * R) + r[None, :]
    inside = (c < C)[:, None] & (r < R)[None, :]
    tl.store(out_ptrs, (x & 0xFF).to(tl.uint8), mask=inside)
    tl.store(out_ptrs + R, (x >> 8).to(tl.uint8), mask=inside)


CHUNK = gl.constexpr(32)  # rows n of W per step
TILE_K = gl.constexpr(256)  # columns k of W per program: four operands of 64


@gluon.jit
def _rows_of_pairs(low_even, low_odd, high_even, high_odd, LEFT: gl.constexpr):
    """Arrange ``[n / 2, word]`` values of n, n + 1 at columns 8 word + i (+ 4) as an operand ``[64, n]``.

    The row is ``16 (word / 8) + 8 (low, high) + word % 8``.
    """
    value = gl.join(gl.join(low_even, low_odd), gl.join(high_even, high_odd))
    value = value.reshape([CHUNK // 2, 4, 8, 2, 2]).permute([1, 4, 2, 0, 3]).reshape([64, CHUNK])
    return gl.convert_layout(value, LEFT)


@gluon.jit
def _operands(w_smem, scales, top, WORDS: gl.constexpr, PAIRS: gl.constexpr, LEFT: gl.constexpr,
              EXACT: gl.constexpr):  # fmt: skip
    """Decode words ``[CHUNK, 32]`` to four left operands ``[64, CHUNK]``; the i-th has columns i and 4 + i.

    ``scales [CHUNK / 2, 32]``: two bytes per word, of rows 2 j and 2 j + 1.
    """
    words = w_smem.load(WORDS).reshape([CHUNK // 2, 2, 32]).permute([0, 2, 1])
    first, second = gl.split(words)
    first = gl.convert_layout(first, PAIRS)
    second = gl.convert_layout(second, PAIRS)
    scales = scales.to(gl.int32)
    if EXACT:
        scale = exact_scale(scales & 0xFF) | (exact_scale(scales >> 8) << 16)
    else:
        scale = windowed_scale(prmt(scales, gl.zeros_like(scales), "0x4140"))
        top = max_u16x2(top, scale)
    a0, b0, a1, b1, a2, b2, a3, b3 = decode_pairs(prmt(first, second, "0x5410"), scale, EXACT)
    c0, d0, c1, d1, c2, d2, c3, d3 = decode_pairs(prmt(first, second, "0x7632"), scale, EXACT)
    return (
        _rows_of_pairs(a0, b0, c0, d0, LEFT),
        _rows_of_pairs(a1, b1, c1, d1, LEFT),
        _rows_of_pairs(a2, b2, c2, d2, LEFT),
        _rows_of_pairs(a3, b3, c3, d3, LEFT),
        top,
    )


@gluon.jit
def _mma(a0, a1, a2, a3, x, c0, c1, c2, c3):
    c0 = warpgroup_mma(a0, x, c0, is_async=True)
    c1 = warpgroup_mma(a1, x, c1, is_async=True)
    c2 = warpgroup_mma(a2, x, c2, is_async=True)
    c3 = warpgroup_mma(a3, x, c3, is_async=True)
    return c0, c1, c2, c3


@gluon.jit
def _restart(c0, c1, c2, c3):
    return (
        warpgroup_mma_init(c0),
        warpgroup_mma_init(c1),
        warpgroup_mma_init(c2),
        warpgroup_mma_init(c3),
    )


@gluon.jit
def _pointers(x_ptr, w_ptr, s_ptr, order_ptr, expert, row0, end, k0, N, K, x_stride, n_rows, top_k,
              GATHER: gl.constexpr, PAIRS: gl.constexpr, TILE_T: gl.constexpr):  # fmt: skip
    """Find the start of the first chunk of W, of x and of the scales, and which words are inside."""
    COPY_W: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    first_row = expert.to(gl.int64) * N
    w_row = (K // 32) * 4  # visibly a multiple of four to the compiler: 16-byte copies
    n = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, COPY_W))
    word = k0 // 8 + gl.arange(0, 32, layout=gl.SliceLayout(0, COPY_W))
    w_ptrs = w_ptr + (first_row + n)[:, None] * w_row + word[None, :]
    w_mask = (word < w_row)[None, :] & (n >= 0)[:, None]
    m = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, COPY_X)), end - 1)
    if GATHER:
        m = token_of(order_ptr, m, n_rows, top_k)
    n_x = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, COPY_X))
    x_ptrs = x_ptr + (m.to(gl.int64) * x_stride)[:, None] + n_x[None, :]
    pair = gl.arange(0, CHUNK // 2, layout=gl.SliceLayout(1, PAIRS))
    block = k0 // 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, PAIRS)) // 4
    block = gl.minimum(block, K // 32 - 1)
    row = expert.to(gl.int64) * (K // 32) + block
    s_ptrs = s_ptr + row[None, :] * (N // 2) + pair[:, None]
    return w_ptrs, x_ptrs, s_ptrs, w_mask


@gluon.jit
def _store(y_ptr, c0, c1, c2, c3, bias_ptr, row0, end, k0, K, split, HAS_BIAS: gl.constexpr,
           TILE_T: gl.constexpr):  # fmt: skip
    """Interleave the four accumulators ``[64, TILE_T]`` and store their rows: no data crosses threads."""
    wide: gl.constexpr = (
        [[8, 0]] if TILE_T == 16 else [[8, 0], [16, 0]] if TILE_T == 32 else [[8, 0], [16, 0], [32, 0]]
    )  # fmt: skip
    # 8 neighbouring k per thread, 64 per warp.
    OUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [1, 0]] + wide,
        [[2, 0], [4, 0], [0, 8], [0, 16], [0, 32]], [[0, 64], [0, 128]], [], [TILE_T, TILE_K],
    )  # fmt: skip
    k = k0 + gl.arange(0, TILE_K, layout=gl.SliceLayout(0, OUT))
    m = row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, OUT))
    # [16-row group, block half, word, token, i / 2, i % 2] becomes [token, k]
    y = gl.join(gl.join(c0, c2), gl.join(c1, c3)).reshape([4, 2, 8, TILE_T, 2, 2])
    y = gl.convert_layout(y.permute([3, 0, 2, 1, 4, 5]).reshape([TILE_T, TILE_K]), OUT)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + k, mask=(k < K) & (split == 0), other=0.0)
        y += bias.to(gl.float32)[None, :]
    y_ptrs = y_ptr + (m.to(gl.int64) * K)[:, None] + k[None, :]
    gl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(m < end)[:, None] & (k < K)[None, :])


@gluon.jit
def _copy(w_smem, x_smem, w_ptrs, x_ptrs, w_mask, chunk, chunks, w_step, STAGES: gl.constexpr):
    """Start the copy of a chunk; chunks past the last one are filled with zeros."""
    stage = chunk % STAGES
    there = chunk < chunks
    async_copy.async_copy_global_to_shared(
        w_smem.index(stage), w_ptrs + chunk * w_step, mask=w_mask & there
    )
    async_copy.async_copy_global_to_shared(x_smem.index(stage), x_ptrs + chunk * CHUNK, mask=there)
    async_copy.commit_group()


@launched
@gluon.jit(do_not_specialize=["n_rows", "E", "top_k", "r"])  # E specialised to 1 breaks Triton 3.6
def backward_kernel(x_ptr, w_ptr, s_ptr, y_ptr, offs_ptr, order_ptr, h_ptr, up_ptr, bias_ptr,
                    n_rows, E, N, K, x_stride, top_k, r, up_e, up_k, up_r, bias_e, scaling,
                    GROUPED: gl.constexpr, GATHER: gl.constexpr, RANK: gl.constexpr,
                    HAS_BIAS: gl.constexpr, TILE_T: gl.constexpr, STAGES: gl.constexpr,
                    TWO_OPERANDS: gl.constexpr, E_SPAN: gl.constexpr,
                    SPLITS: gl.constexpr):  # fmt: skip
    """Compute ``y [n_rows, K]``; w int32 ``[E, N, K / 8]``, s uint16 ``[E, K / 32, N / 2]``: transposed, rows in pairs.

    CHUNK divides N. SPLITS > 1 (not GROUPED): y is fp32 ``[SPLITS, n_rows, K]``, sums over parts of N, to be added.
    """
    tiles_k = gl.cdiv(K, TILE_K)
    split = gl.program_id(0) % SPLITS
    pid = gl.program_id(0) // SPLITS
    tile_k = pid % tiles_k
    expert, row0, end = find_tile(pid // tiles_k, offs_ptr, n_rows, E, GROUPED, TILE_T, E_SPAN)
    if row0 >= end:
        return
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_T, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    k0 = tile_k * TILE_K
    if expert == E:
        _store(y_ptr, gl.zeros([64, TILE_T], gl.float32, mma), gl.zeros([64, TILE_T], gl.float32, mma),
               gl.zeros([64, TILE_T], gl.float32, mma), gl.zeros([64, TILE_T], gl.float32, mma), bias_ptr, row0,
               end, k0, K, split, False, TILE_T)  # fmt: skip
        return

    # Each thread's words: rows 2 t, 2 t + 1 and the two 8 further on; word g of its warp's eight.
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [8, 0], [16, 0]],
        [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16]], [], [CHUNK, 32],
    )  # fmt: skip
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [[4, 0], [8, 0]],
        [[1, 0], [2, 0], [0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16]], [], [CHUNK // 2, 32],
    )  # fmt: skip
    w_shared: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    x_shared: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, CHUNK, 32], w_shared)
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE_T, CHUNK], x_shared)

    first = part_start(N // CHUNK, split, SPLITS)
    x_ptr += first * CHUNK
    w_ptr += first * CHUNK * ((K // 32) * 4)
    s_ptr += first * (CHUNK // 2)
    w_ptrs, x_ptrs, s_ptrs, w_mask = _pointers(
        x_ptr, w_ptr, s_ptr, order_ptr, expert, row0, end, k0, N, K, x_stride, n_rows,
        top_k, GATHER, PAIRS, TILE_T,
    )  # fmt: skip
    w_step = (K // 32) * 4 * CHUNK
    chunks = part_start(N // CHUNK, split + 1, SPLITS) - first
    for i in gl.static_range(STAGES - 1):
        _copy(w_smem, x_smem, w_ptrs, x_ptrs, w_mask, i, chunks, w_step, STAGES)
    scales = gl.load(s_ptrs)
    s_next = gl.load(s_ptrs + gl.minimum(1, chunks - 1) * (CHUNK // 2))
    top = gl.full([CHUNK // 2, 32], 0, gl.int32, PAIRS)
    zero = gl.zeros([64, TILE_T], gl.float32, mma)
    c0, c1, c2, c3 = _restart(zero, zero, zero, zero)
    async_copy.wait_group(STAGES - 2)
    a0, a1, a2, a3, top = _operands(w_smem.index(0), scales, top, WORDS, PAIRS, LEFT, False)
    if TWO_OPERANDS:
        b0 = a0
        b1 = a1
        b2 = a2
        b3 = a3
        for i in range(0, chunks, 2):
            x = x_smem.index(i % STAGES).permute((1, 0))
            c0, c1, c2, c3 = _mma(a0, a1, a2, a3, x, c0, c1, c2, c3)
            scales = gl.load(s_ptrs + gl.minimum(i + 2, chunks - 1) * (CHUNK // 2))
            c0, c1, c2, c3, b0, b1, b2, b3 = warpgroup_mma_wait(
                4, deps=[c0, c1, c2, c3, b0, b1, b2, b3]
            )
            c0, c1, c2, c3 = _restart(c0, c1, c2, c3)
            async_copy.wait_group(STAGES - 3)
            b0, b1, b2, b3, top = _operands(
                w_smem.index((i + 1) % STAGES), s_next, top, WORDS, PAIRS, LEFT, False
            )
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, w_mask, i + STAGES - 1, chunks, w_step, STAGES)
            x = x_smem.index((i + 1) % STAGES).permute((1, 0))
            c0, c1, c2, c3 = _mma(b0, b1, b2, b3, x, c0, c1, c2, c3)
            s_next = gl.load(s_ptrs + gl.minimum(i + 3, chunks - 1) * (CHUNK // 2))
            c0, c1, c2, c3, a0, a1, a2, a3 = warpgroup_mma_wait(
                4, deps=[c0, c1, c2, c3, a0, a1, a2, a3]
            )
            c0, c1, c2, c3 = _restart(c0, c1, c2, c3)
            async_copy.wait_group(STAGES - 3)
            a0, a1, a2, a3, top = _operands(
                w_smem.index((i + 2) % STAGES), scales, top, WORDS, PAIRS, LEFT, False
            )
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, w_mask, i + STAGES, chunks, w_step, STAGES)
        c0, c1, c2, c3, b0, b1, b2, b3 = warpgroup_mma_wait(
            0, deps=[c0, c1, c2, c3, b0, b1, b2, b3]
        )
    else:
        for i in range(chunks):
            x = x_smem.index(i % STAGES).permute((1, 0))
            c0, c1, c2, c3 = _mma(a0, a1, a2, a3, x, c0, c1, c2, c3)
            scales = gl.load(s_ptrs + gl.minimum(i + 2, chunks - 1) * (CHUNK // 2))
            async_copy.wait_group(STAGES - 3)
            c0, c1, c2, c3, a0, a1, a2, a3 = warpgroup_mma_wait(
                0, deps=[c0, c1, c2, c3, a0, a1, a2, a3]
            )
            c0, c1, c2, c3 = _restart(c0, c1, c2, c3)
            a0, a1, a2, a3, top = _operands(
                w_smem.index((i + 1) % STAGES), s_next, top, WORDS, PAIRS, LEFT, False
            )
            s_next = scales
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, w_mask, i + STAGES - 1, chunks, w_step, STAGES)
        c0, c1, c2, c3 = warpgroup_mma_wait(0, deps=[c0, c1, c2, c3])
    async_copy.wait_group(0)
    c0 = c0 * (2.0**WINDOW)
    c1 = c1 * (2.0**WINDOW)
    c2 = c2 * (2.0**WINDOW)
    c3 = c3 * (2.0**WINDOW)
    if overflows(top):
        c0 = zero
        c1 = zero
        c2 = zero
        c3 = zero
        w_ptrs, x_ptrs, s_ptrs, w_mask = _pointers(
            x_ptr, w_ptr, s_ptr, order_ptr, expert, row0, end, opaque(tile_k) * TILE_K, N, K, x_stride, n_rows, top_k,
            GATHER, PAIRS, TILE_T,
        )  # fmt: skip
        for i in range(chunks):
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, w_mask, i, chunks, w_step, 1)
            scales = gl.load(s_ptrs + i * (CHUNK // 2))
            async_copy.wait_group(0)
            a0, a1, a2, a3, top = _operands(w_smem.index(0), scales, top, WORDS, PAIRS, LEFT, True)
            x = x_smem.index(0).permute((1, 0))
            c0, c1, c2, c3 = _mma(a0, a1, a2, a3, x, c0, c1, c2, c3)
            c0, c1, c2, c3 = warpgroup_mma_wait(0, deps=[c0, c1, c2, c3])

    expert = opaque(expert)
    row0 = opaque(row0)
    k0 = opaque(tile_k) * TILE_K
    if RANK > 0:
        h_shared: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
        COPY_H: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
        h_smem = gl.allocate_shared_memory(gl.bfloat16, [TILE_T, 16], h_shared)
        m_h = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, COPY_H)), end - 1)
        j_h = gl.arange(0, 16, layout=gl.SliceLayout(0, COPY_H))
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, LEFT))
        k = k0 + 64 * (row // 16) + 8 * (row % 8) + 4 * (row // 8 % 2)
        j_up = gl.arange(0, 16, layout=gl.SliceLayout(0, LEFT))
        up_ptrs = up_ptr + expert.to(gl.int64) * up_e + (k.to(gl.int64) * up_k)[:, None]
        for j in range(0, gl.where(split == 0, r, 0), 16):
            h_ptrs = h_ptr + (m_h.to(gl.int64) * r)[:, None] + (j + j_h)[None, :]
            h_smem.store(gl.load(h_ptrs, mask=(j + j_h < r)[None, :], other=0.0))
            column = up_ptrs + ((j + j_up) * up_r)[None, :]
            inside = (k < K)[:, None] & (j + j_up < r)[None, :]
            u0 = (gl.load(column, mask=inside, other=0.0).to(gl.float32) * scaling).to(gl.bfloat16)
            u1 = (gl.load(column + up_k, mask=inside, other=0.0).to(gl.float32) * scaling).to(
                gl.bfloat16
            )
            u2 = (gl.load(column + 2 * up_k, mask=inside, other=0.0).to(gl.float32) * scaling).to(
                gl.bfloat16
            )
            u3 = (gl.load(column + 3 * up_k, mask=inside, other=0.0).to(gl.float32) * scaling).to(
                gl.bfloat16
            )
            fence_async_shared()
            c0, c1, c2, c3 = _mma(u0, u1, u2, u3, h_smem.permute((1, 0)), c0, c1, c2, c3)
            c0, c1, c2, c3 = warpgroup_mma_wait(0, deps=[c0, c1, c2, c3])
    y_ptr += split.to(gl.int64) * n_rows * K
    _store(
        y_ptr, c0, c1, c2, c3, bias_ptr + expert * bias_e, row0, end, k0, K, split, HAS_BIAS, TILE_T
    )
