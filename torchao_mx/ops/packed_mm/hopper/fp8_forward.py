"""Hopper: ``y = x W^T`` on the 8-bit tensor cores, MXFP4 weights decoded to e4m3 in wgmma's registers.

As in ``hopper/forward.py``, the weight tile is the left operand. Per 32 columns of K (a block, and a step of
wgmma), a thread holds word t of four in its rows. The word's nibbles 0 .. 3 are four neighbours of the
operand, and 4 .. 7 are those 16 columns on, so the tensor core meets K in the order ``16 half + 4 word + i``
instead of ``8 word + 4 half + i``. ``quantize_rows_kernel`` (``fp8/kernels.py``) writes x in that order.

A row's blocks share the largest scale (``fp8/weight.py``). Each other block is some binades below it, and a
table of the eight magnitudes is lowered by as many. One byte permutation then looks up four.
"""

from __future__ import annotations

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
from torchao_mx.ops.packed_mm.hopper.forward import _store
from torchao_mx.ops.packed_mm.hopper.tile import find_tile, opaque, token_of

CHUNK = gl.constexpr(128)  # columns of K per step
_BYTES = gl.constexpr(64)  # per row of W
# The magnitudes of e2m1 times 64, as bytes of e4m3; one binade less is 8 less in each byte except zero.
LOW, HIGH = gl.constexpr(0x6C686000), gl.constexpr(0x7C787470)


@gluon.jit
def _block(packed, lowered, QUARTER: gl.constexpr, TILE_N: gl.constexpr):
    """Decode a block, bytes ``[TILE_N, 16]``, to e4m3 ``[TILE_N, 32]``; ``lowered [TILE_N]``: 8 x the binades."""
    spread = gl.full([TILE_N, 16], 0, gl.int32, QUARTER)
    low = spread + (LOW - lowered * 0x01010100)[:, None]
    high = spread + (HIGH - lowered * 0x01010101)[:, None]
    first, second = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 index, shifted, sign;
        and.b32 index, $2, 0x77777777;
        shl.b32 shifted, $2, 4;
        prmt.b32 $0, $3, $7, index;
        prmt.b32 sign, shifted, $2, 0x5140;
        lop3.b32 $0, sign, 0x80808080, $0, 0xEA;
        shr.u32 index, index, 16;
        prmt.b32 $1, $3, $7, index;
        prmt.b32 sign, shifted, $2, 0x7362;
        lop3.b32 $1, sign, 0x80808080, $1, 0xEA;
        }
        """,
        "=&r,=&r,r,r,r,r,r,r,r,r,r",
        [packed, low, high],
        dtype=(gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )
    return gl.join(first, second).permute([0, 2, 1]).reshape([TILE_N, 32])


@gluon.jit
def _operand(w_smem, lowered, BYTES: gl.constexpr, QUARTER: gl.constexpr, LEFT: gl.constexpr,
             TILE_N: gl.constexpr):  # fmt: skip
    """Decode bytes ``[TILE_N, 64]`` to a left operand ``[TILE_N, 128]``; ``lowered``: one byte per block."""
    packed = w_smem.load(BYTES).reshape([TILE_N, 2, 2, 16]).permute([0, 3, 1, 2])
    even, odd = gl.split(packed)
    p0, p2 = gl.split(even)
    p1, p3 = gl.split(odd)
    b0 = _block(gl.convert_layout(p0, QUARTER), lowered & 0xFF, QUARTER, TILE_N)
    b1 = _block(gl.convert_layout(p1, QUARTER), (lowered >> 8) & 0xFF, QUARTER, TILE_N)
    b2 = _block(gl.convert_layout(p2, QUARTER), (lowered >> 16) & 0xFF, QUARTER, TILE_N)
    b3 = _block(gl.convert_layout(p3, QUARTER), (lowered >> 24) & 0xFF, QUARTER, TILE_N)
    both = gl.join(gl.join(b0, b1), gl.join(b2, b3))  # [n, k, block % 2, block / 2]
    return gl.convert_layout(both.permute([0, 3, 2, 1]).reshape([TILE_N, CHUNK]), LEFT)


@gluon.jit
def _copy(w_smem, x_smem, w_ptrs, byte, x_ptrs, chunk, chunks, row_bytes, STAGES: gl.constexpr):
    """Start the copy of a chunk; chunks past the last one are filled with zeros."""
    stage = chunk % STAGES
    there = chunk < chunks
    inside = there & (chunk * _BYTES + byte < row_bytes)
    async_copy.async_copy_global_to_shared(
        w_smem.index(stage), w_ptrs + chunk * _BYTES, mask=inside[None, :]
    )
    async_copy.async_copy_global_to_shared(x_smem.index(stage), x_ptrs + chunk * CHUNK, mask=there)
    async_copy.commit_group()


@gluon.jit
def finished(acc, x_scale_ptr, w_scale_ptr, order_ptr, h_ptr, up_ptr, bias_ptr, expert, row0, end, column, column_up,
             columns, n_rows, top_k, r, up_e, up_n, up_r, bias_e, scaling, GATHER: gl.constexpr,
             RANK: gl.constexpr, HAS_BIAS: gl.constexpr, mma: gl.constexpr, mma_16: gl.constexpr,
             TILE_T: gl.constexpr):  # fmt: skip
    """Scale the sums ``[TILE, TILE_T]`` by both scales; add the low-rank term (bf16 products) and the bias.

    ``column`` and ``column_up``: y's columns for the rows of acc, in the layouts of acc and of an operand.
    """
    m = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(0, mma)), end - 1)
    if GATHER:
        m = token_of(order_ptr, m, n_rows, top_k)
    scale_ptrs = w_scale_ptr + expert.to(gl.int64) * columns + column
    w_scale = gl.load(scale_ptrs, mask=column < columns, other=0.0)
    acc = acc * w_scale[:, None] * gl.load(x_scale_ptr + m)[None, :]
    if RANK > 0:
        LEFT: gl.constexpr = gl.DotOperandLayout(0, mma_16, 2)
        COPY_H: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [gl.num_warps(), 1], [1, 0])
        h_shared: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
        h_smem = gl.allocate_shared_memory(gl.bfloat16, [TILE_T, 16], h_shared)
        m_h = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, COPY_H)), end - 1)
        j_h = gl.arange(0, 16, layout=gl.SliceLayout(0, COPY_H))
        j_up = gl.arange(0, 16, layout=gl.SliceLayout(0, LEFT))
        column_up = gl.minimum(column_up, columns - 1)
        up_ptrs = up_ptr + expert.to(gl.int64) * up_e + (column_up * up_n)[:, None]
        total = gl.convert_layout(acc, mma_16)
        for j in range(0, r, 16):
            h_ptrs = h_ptr + (m_h.to(gl.int64) * r)[:, None] + (j + j_h)[None, :]
            h_smem.store(gl.load(h_ptrs, mask=(j + j_h < r)[None, :], other=0.0))
            up = gl.load(
                up_ptrs + ((j + j_up) * up_r)[None, :], mask=(j + j_up < r)[None, :], other=0.0
            )
            up = (up.to(gl.float32) * scaling).to(gl.bfloat16)
            fence_async_shared()
            total = warpgroup_mma(up, h_smem.permute((1, 0)), total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
        acc = gl.convert_layout(total, mma)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + expert * bias_e + column, mask=column < columns, other=0.0)
        acc += bias.to(gl.float32)[:, None]
    return acc


@launched
@gluon.jit(do_not_specialize=["n_rows", "E", "top_k", "r"])  # E specialised to 1 breaks Triton 3.6
def fp8_forward_kernel(x_ptr, x_scale_ptr, w_ptr, lowered_ptr, w_scale_ptr, y_ptr, offs_ptr, order_ptr, h_ptr,
                       up_ptr, bias_ptr, n_rows, E, N, K, x_stride, top_k, r, up_e, up_n, up_r, bias_e,
                       scaling, GROUPED: gl.constexpr, GATHER: gl.constexpr, RANK: gl.constexpr,
                       HAS_BIAS: gl.constexpr, TILE_T: gl.constexpr, TILE_N: gl.constexpr,
                       STAGES: gl.constexpr, OPERANDS: gl.constexpr,
                       E_SPAN: gl.constexpr):  # fmt: skip
    """Compute ``y [n_rows, N]``; x e4m3 in kernel order, its pitch whole chunks; w bytes ``[E, N, K / 2]``.

    ``x_scale`` fp32, one per row of x; ``lowered`` int32 ``[E, N, chunks]``, a byte per block; ``w_scale``
    fp32 ``[E, N]``. With two OPERANDS, a chunk is decoded while the tensor core works on the previous one.
    """
    tiles_n = gl.cdiv(N, TILE_N)
    pid = gl.program_id(0)
    n0 = (pid % tiles_n) * TILE_N
    expert, row0, end = find_tile(pid // tiles_n, offs_ptr, n_rows, E, GROUPED, TILE_T, E_SPAN)
    if row0 >= end:
        return
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_T, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    mma_16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_T, 16])
    if expert == E:
        _store(y_ptr, gl.zeros([TILE_N, TILE_T], gl.float32, mma), row0, end, n0, N, TILE_T, TILE_N)
        return

    # Each thread's bytes: four of each block at 4 t, in rows g and g + 8 of 16 (g = lane / 4, t = lane % 4).
    rows: gl.constexpr = [[8, 0]] if TILE_N == 16 * WARPS else [[8, 0], [16 * WARPS, 0]]
    lanes: gl.constexpr = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    warps: gl.constexpr = [[16, 0], [32, 0]] if WARPS == 4 else [[16, 0], [32, 0], [64, 0]]
    BYTES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32]] + rows, lanes, warps, [], [TILE_N, 64]
    )
    QUARTER: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2]] + rows, lanes, warps, [], [TILE_N, 16]
    )
    ROW: gl.constexpr = gl.SliceLayout(1, QUARTER)
    w_shared: gl.constexpr = gl.SwizzledSharedLayout(16, 2, 4, [1, 0])
    x_shared: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    w_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, TILE_N, 64], w_shared)
    x_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_T, CHUNK], x_shared)

    COPY_W: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    # The compiler must see that this is at least 1: sums set on a path past the loop serialise its wgmmas.
    chunks = gl.maximum(gl.cdiv(K, CHUNK), 1)
    row_bytes = (K // 32) * 16  # visibly a multiple of 16 to the compiler: 16-byte copies
    first_row = expert.to(gl.int64) * N
    n = gl.minimum(n0 + gl.arange(0, TILE_N, layout=gl.SliceLayout(1, COPY_W)), N - 1)
    byte = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY_W))
    w_ptrs = w_ptr + (first_row + n)[:, None] * row_bytes + byte[None, :]
    m = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, COPY_X)), end - 1)
    if GATHER:
        m = token_of(order_ptr, m, n_rows, top_k)
    k = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, COPY_X))
    x_ptrs = x_ptr + (m.to(gl.int64) * x_stride)[:, None] + k[None, :]
    n_low = gl.minimum(n0 + gl.arange(0, TILE_N, layout=ROW), N - 1)
    low_ptrs = lowered_ptr + (first_row + n_low) * chunks

    for i in gl.static_range(STAGES - 1):
        _copy(w_smem, x_smem, w_ptrs, byte, x_ptrs, i, chunks, row_bytes, STAGES)
    lowered = gl.load(low_ptrs)
    acc = warpgroup_mma_init(gl.zeros([TILE_N, TILE_T], gl.float32, mma))
    # No operand lives across iterations: it would be carried byte by byte.
    for i in range(0, chunks, OPERANDS):
        for j in gl.static_range(OPERANDS):
            stage = (i + j) % STAGES
            async_copy.wait_group(STAGES - 2)
            a = _operand(w_smem.index(stage), lowered, BYTES, QUARTER, LEFT, TILE_N)
            lowered = gl.load(low_ptrs + gl.minimum(i + j + 1, chunks - 1))
            acc = warpgroup_mma(a, x_smem.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(OPERANDS - 1, deps=[acc]))
            chunk = i + j + STAGES - 1
            _copy(w_smem, x_smem, w_ptrs, byte, x_ptrs, chunk, chunks, row_bytes, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)

    expert = opaque(expert)
    n0 = opaque(pid % tiles_n) * TILE_N
    row0 = opaque(row0)
    acc = finished(
        acc, x_scale_ptr, w_scale_ptr, order_ptr, h_ptr, up_ptr, bias_ptr, expert, row0, end,
        n0 + gl.arange(0, TILE_N, layout=gl.SliceLayout(1, mma)),
        n0 + gl.arange(0, TILE_N, layout=gl.SliceLayout(1, gl.DotOperandLayout(0, mma_16, 2))),
        N, n_rows, top_k, r, up_e, up_n, up_r, bias_e, scaling, GATHER, RANK, HAS_BIAS, mma, mma_16, TILE_T,
    )  # fmt: skip
    _store(y_ptr, acc, row0, end, n0, N, TILE_T, TILE_N)
