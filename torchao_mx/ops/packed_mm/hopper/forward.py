"""Hopper, few to some hundred rows per expert: ``y = x W^T``, MXFP4 weights decoded into wgmma registers.

The weight tile is the *left* operand, ``y^T = W x^T``: it can come from registers, and few rows of x (16 or
more) fill wgmma's narrow side. Per 64 columns of K, a thread holds words t and t + 4 of eight in its rows. A
word's nibbles i and i + 4 are a pair, so the tensor core meets K in the order ``16 i + 2 word + half``
instead of ``8 word + 4 half + i``. ``permute_kernel`` brings x into that order once, for all experts; rows
are then gathered by their index on the way to shared memory.
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

CHUNK = gl.constexpr(64)  # columns of K per step


@launched
@triton.jit
def permute_kernel(x_ptr, out_ptr, n_chunks, chunks_per_row, x_stride, TILE: tl.constexpr):
    """Permute ``x [T, K]``, 64 columns at a time, to a contiguous ``out`` in the forward kernel's order."""
    chunk = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (chunk < n_chunks)[:, None]
    row = (chunk // chunks_per_row).to(tl.int64)
    source = row * x_stride + (chunk % chunks_per_row) * 64
    index = tl.arange(0, 64)
    x = tl.load(x_ptr + source[:, None] + index[None, :], mask=inside, other=0.0)
    x = x.reshape(TILE, 8, 2, 4).permute(0, 3, 1, 2).reshape(TILE, 64)
    tl.store(out_ptr + chunk.to(tl.int64)[:, None] * 64 + index[None, :], x, mask=inside)


@gluon.jit
def _operand(w_smem, scales, top, WORDS: gl.constexpr, HALF: gl.constexpr, LEFT: gl.constexpr,
             TILE_N: gl.constexpr, EXACT: gl.constexpr):  # fmt: skip
    """Decode words ``[TILE_N, 8]`` to a left operand ``[TILE_N, 64]``; ``scales [TILE_N]``: two bytes per row."""
    words = w_smem.load(WORDS).reshape([TILE_N, 2, 4]).permute([0, 2, 1])
    first, second = gl.split(words)  # the words of the first and the second block of 32
    first = gl.convert_layout(first, HALF)
    second = gl.convert_layout(second, HALF)
    scales = scales.to(gl.int32)
    if EXACT:
        low = exact_scale(scales & 0xFF) * 0x10001
        high = exact_scale(scales >> 8) * 0x10001
    else:
        zero = gl.zeros_like(scales)
        low = windowed_scale(prmt(scales, zero, "0x4040"))
        high = windowed_scale(prmt(scales, zero, "0x4141"))
        top = max_u16x2(max_u16x2(top, low), high)
    spread = gl.full([TILE_N, 4], 0, gl.int32, HALF)
    a0, a4, a1, a5, a2, a6, a3, a7 = decode_pairs(first, spread + low[:, None], EXACT)
    b0, b4, b1, b5, b2, b6, b3, b7 = decode_pairs(second, spread + high[:, None], EXACT)
    a = gl.join(
        gl.join(gl.join(a0, a4), gl.join(a2, a6)), gl.join(gl.join(a1, a5), gl.join(a3, a7))
    )
    b = gl.join(
        gl.join(gl.join(b0, b4), gl.join(b2, b6)), gl.join(gl.join(b1, b5), gl.join(b3, b7))
    )
    # [n, word, half, i / 2, i % 2, block] becomes K = 16 i + 8 block + 2 word + half
    both = gl.join(a, b).permute([0, 3, 4, 5, 1, 2]).reshape([TILE_N, CHUNK])
    return gl.convert_layout(both, LEFT), top


@gluon.jit
def _pointers(x_ptr, w_ptr, s_ptr, order_ptr, expert, row0, end, n0, N, K, x_stride, n_rows, top_k,
              GATHER: gl.constexpr, ROW: gl.constexpr, TILE_T: gl.constexpr,
              TILE_N: gl.constexpr):  # fmt: skip
    """Find the start of the first chunk of W, of x and of the scales."""
    COPY_W: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [gl.num_warps(), 1], [1, 0])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    first_row = expert.to(gl.int64) * N
    n = gl.minimum(n0 + gl.arange(0, TILE_N, layout=gl.SliceLayout(1, COPY_W)), N - 1)
    word = gl.arange(0, 8, layout=gl.SliceLayout(0, COPY_W))
    # Visibly a multiple of four to the compiler: 16-byte copies.
    w_ptrs = w_ptr + (first_row + n)[:, None] * ((K // 32) * 4) + word[None, :]
    m = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, COPY_X)), end - 1)
    if GATHER:
        m = token_of(order_ptr, m, n_rows, top_k)
    k = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, COPY_X))
    x_ptrs = x_ptr + (m.to(gl.int64) * x_stride)[:, None] + k[None, :]
    n_scale = gl.minimum(n0 + gl.arange(0, TILE_N, layout=ROW), N - 1)
    return w_ptrs, x_ptrs, s_ptr + (first_row + n_scale) * (K // 64)


@gluon.jit
def _store(y_ptr, y, row0, end, n0, N, TILE_T: gl.constexpr, TILE_N: gl.constexpr):
    """Store ``y [TILE_N, TILE_T]`` to its rows."""
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // TILE_N, TILE_N // 8], [gl.num_warps(), 1], [1, 0]
    )
    y = y.to(y_ptr.dtype.element_ty)
    smem = gl.allocate_shared_memory(y.dtype, [TILE_T, TILE_N], SHARED)
    smem.permute((1, 0)).store(y)
    n = n0 + gl.arange(0, TILE_N, layout=gl.SliceLayout(0, OUT))
    m = row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, OUT))
    y_ptrs = y_ptr + (m.to(gl.int64) * N)[:, None] + n[None, :]
    gl.store(y_ptrs, smem.load(OUT), mask=(m < end)[:, None] & (n < N)[None, :])


@gluon.jit
def _copy(w_smem, x_smem, w_ptrs, x_ptrs, chunk, chunks, STAGES: gl.constexpr):
    """Start the copy of a chunk; chunks past the last one are filled with zeros."""
    stage = chunk % STAGES
    there = chunk < chunks
    async_copy.async_copy_global_to_shared(w_smem.index(stage), w_ptrs + chunk * 8, mask=there)
    async_copy.async_copy_global_to_shared(x_smem.index(stage), x_ptrs + chunk * CHUNK, mask=there)
    async_copy.commit_group()


@launched
@gluon.jit(do_not_specialize=["n_rows", "E", "top_k", "r"])  # E specialised to 1 breaks Triton 3.6
def forward_kernel(x_ptr, w_ptr, s_ptr, y_ptr, offs_ptr, order_ptr, h_ptr, up_ptr, bias_ptr,
                   n_rows, E, N, K, x_stride, top_k, r, up_e, up_n, up_r, bias_e, scaling,
                   GROUPED: gl.constexpr, GATHER: gl.constexpr, RANK: gl.constexpr,
                   HAS_BIAS: gl.constexpr, TILE_T: gl.constexpr, TILE_N: gl.constexpr,
                   STAGES: gl.constexpr, TWO_OPERANDS: gl.constexpr, E_SPAN: gl.constexpr,
                   SPLITS: gl.constexpr):  # fmt: skip
    """Compute ``y [n_rows, N]``; x permuted, w int32 words ``[E, N, K / 8]``, s uint16 ``[E, N, K / 64]``.

    With SPLITS above 1 (not GROUPED), y is fp32 ``[SPLITS, n_rows, N]``: sums over parts of K, to be added.

    TWO_OPERANDS decodes the next chunk while the tensor core works on this one. It takes registers; narrow
    tiles use those better for more programs per multiprocessor, which overlap just as well.
    """
    tiles_n = gl.cdiv(N, TILE_N)
    split = gl.program_id(0) % SPLITS
    pid = gl.program_id(0) // SPLITS
    n0 = (pid % tiles_n) * TILE_N
    expert, row0, end = find_tile(pid // tiles_n, offs_ptr, n_rows, E, GROUPED, TILE_T, E_SPAN)
    if row0 >= end:
        return
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_T, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    if expert == E:
        _store(y_ptr, gl.zeros([TILE_N, TILE_T], gl.float32, mma), row0, end, n0, N, TILE_T, TILE_N)
        return

    # Each thread's words: rows g and g + 8 of 16, words t and t + 4 of 8 (g = lane / 4, t = lane % 4).
    rows: gl.constexpr = [[8, 0]] if TILE_N == 16 * WARPS else [[8, 0], [16 * WARPS, 0]]
    lanes: gl.constexpr = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 4]] + rows, lanes, [[16, 0], [32, 0]], [], [TILE_N, 8]
    )
    HALF: gl.constexpr = gl.DistributedLinearLayout(
        rows, lanes, [[16, 0], [32, 0]], [], [TILE_N, 4]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, HALF)
    w_shared: gl.constexpr = gl.SwizzledSharedLayout(4, 4, 2, [1, 0])
    x_shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, TILE_N, 8], w_shared)
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE_T, CHUNK], x_shared)

    first = part_start(K // CHUNK, split, SPLITS)
    x_ptr += first * CHUNK
    w_ptr += first * 8
    s_ptr += first
    w_ptrs, x_ptrs, s_ptrs = _pointers(
        x_ptr, w_ptr, s_ptr, order_ptr, expert, row0, end, n0, N, K, x_stride, n_rows,
        top_k, GATHER, ROW, TILE_T, TILE_N,
    )  # fmt: skip
    chunks = part_start(K // CHUNK, split + 1, SPLITS) - first
    for i in gl.static_range(STAGES - 1):
        _copy(w_smem, x_smem, w_ptrs, x_ptrs, i, chunks, STAGES)
    scales = gl.load(s_ptrs)
    s_next = gl.load(s_ptrs + gl.minimum(1, chunks - 1))
    top = gl.full([TILE_N], 0, gl.int32, ROW)
    acc = warpgroup_mma_init(gl.zeros([TILE_N, TILE_T], gl.float32, mma))
    async_copy.wait_group(STAGES - 2)
    a, top = _operand(w_smem.index(0), scales, top, WORDS, HALF, LEFT, TILE_N, False)
    if TWO_OPERANDS:
        b = a
        for i in range(0, chunks, 2):
            acc = warpgroup_mma(a, x_smem.index(i % STAGES).permute((1, 0)), acc, is_async=True)
            scales = gl.load(s_ptrs + gl.minimum(i + 2, chunks - 1))
            acc, b = warpgroup_mma_wait(1, deps=[acc, b])
            acc = warpgroup_mma_init(acc)
            async_copy.wait_group(STAGES - 3)
            b, top = _operand(
                w_smem.index((i + 1) % STAGES), s_next, top, WORDS, HALF, LEFT, TILE_N, False
            )
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, i + STAGES - 1, chunks, STAGES)
            acc = warpgroup_mma(
                b, x_smem.index((i + 1) % STAGES).permute((1, 0)), acc, is_async=True
            )
            s_next = gl.load(s_ptrs + gl.minimum(i + 3, chunks - 1))
            acc, a = warpgroup_mma_wait(1, deps=[acc, a])
            acc = warpgroup_mma_init(acc)
            async_copy.wait_group(STAGES - 3)
            a, top = _operand(
                w_smem.index((i + 2) % STAGES), scales, top, WORDS, HALF, LEFT, TILE_N, False
            )
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, i + STAGES, chunks, STAGES)
        acc, b = warpgroup_mma_wait(0, deps=[acc, b])
    else:
        for i in range(chunks):
            acc = warpgroup_mma(a, x_smem.index(i % STAGES).permute((1, 0)), acc, is_async=True)
            scales = gl.load(s_ptrs + gl.minimum(i + 2, chunks - 1))
            async_copy.wait_group(STAGES - 3)
            acc, a = warpgroup_mma_wait(0, deps=[acc, a])
            acc = warpgroup_mma_init(acc)
            a, top = _operand(
                w_smem.index((i + 1) % STAGES), s_next, top, WORDS, HALF, LEFT, TILE_N, False
            )
            s_next = scales
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, i + STAGES - 1, chunks, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)
    acc = acc * (2.0**WINDOW)
    if overflows(top):
        acc = gl.zeros([TILE_N, TILE_T], gl.float32, mma)
        w_ptrs, x_ptrs, s_ptrs = _pointers(
            x_ptr, w_ptr, s_ptr, order_ptr, expert, row0, end, opaque(pid % tiles_n) * TILE_N, N, K, x_stride, n_rows, top_k,
            GATHER, ROW, TILE_T, TILE_N,
        )  # fmt: skip
        for i in range(chunks):
            _copy(w_smem, x_smem, w_ptrs, x_ptrs, i, chunks, 1)
            async_copy.wait_group(0)
            a, top = _operand(
                w_smem.index(0), gl.load(s_ptrs + i), top, WORDS, HALF, LEFT, TILE_N, True
            )
            acc = warpgroup_mma(a, x_smem.index(0).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])

    expert = opaque(expert)
    n0 = opaque(pid % tiles_n) * TILE_N
    row0 = opaque(row0)
    if RANK > 0:
        h_shared: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
        COPY_H: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
        h_smem = gl.allocate_shared_memory(gl.bfloat16, [TILE_T, 16], h_shared)
        m_h = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, COPY_H)), end - 1)
        j_h = gl.arange(0, 16, layout=gl.SliceLayout(0, COPY_H))
        n_up = gl.minimum(n0 + gl.arange(0, TILE_N, layout=gl.SliceLayout(1, LEFT)), N - 1)
        j_up = gl.arange(0, 16, layout=gl.SliceLayout(0, LEFT))
        up_ptrs = up_ptr + expert.to(gl.int64) * up_e + (n_up * up_n)[:, None]
        for j in range(0, gl.where(split == 0, r, 0), 16):
            h_ptrs = h_ptr + (m_h.to(gl.int64) * r)[:, None] + (j + j_h)[None, :]
            h_smem.store(gl.load(h_ptrs, mask=(j + j_h < r)[None, :], other=0.0))
            up = gl.load(
                up_ptrs + ((j + j_up) * up_r)[None, :], mask=(j + j_up < r)[None, :], other=0.0
            )
            up = (up.to(gl.float32) * scaling).to(gl.bfloat16)
            fence_async_shared()
            acc = warpgroup_mma(up, h_smem.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
    if HAS_BIAS:
        n_bias = n0 + gl.arange(0, TILE_N, layout=gl.SliceLayout(1, mma))
        adds = (n_bias < N) & (split == 0)
        bias = gl.load(bias_ptr + expert * bias_e + n_bias, mask=adds, other=0.0)
        acc += bias.to(gl.float32)[:, None]
    y_ptr += split.to(gl.int64) * n_rows * N
    _store(y_ptr, acc, row0, end, n0, N, TILE_T, TILE_N)
