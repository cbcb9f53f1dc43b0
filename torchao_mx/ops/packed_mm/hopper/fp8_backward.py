"""Hopper: ``y = x W``, the gradient's product, on the 8-bit tensor cores, MXFP4 decoded in wgmma's registers.

The weight tile is the left operand, ``y^T = W^T x^T``, reduced over the rows n of W. A register needs four n
of one column k. ``ldmatrix`` transposes on the way from shared memory: a thread gets n and n + 1 of the four
codes at ``4 quad .. 4 quad + 3``. Byte permutations turn four decoded rows n, ``[n][k]``, into ``[k][n]``. A
register may hold any n as long as x has the same order: of 32, ``8 j + 2 t + b`` is at ``16 (j / 2) + 4 t +
2 (j % 2) + b``. The order of k in the operand's rows is free too: with W warps, ``4 quad + 2 u + v`` is row
``16 W u + 16 (quad / 8) + 8 v + quad % 8``.

A column's blocks share the largest scale over all rows (``fp8/weight.py``), as in the forward kernel.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from torchao_mx.ops.core.launch import launched
from torchao_mx.ops.packed_mm.hopper.forward import _store
from torchao_mx.ops.packed_mm.hopper.fp8_forward import HIGH, LOW, finished
from torchao_mx.ops.packed_mm.hopper.tile import find_tile, opaque, token_of

CHUNK = gl.constexpr(128)  # rows n of W per step
COLUMNS_A_WARP = gl.constexpr(32)  # k, of W


@gluon.jit
def _decode_quads(codes, low, high):
    """Decode int16 ``[n, quad]`` of four codes, a table for each, to four e4m3 ``[n, quad]``; n in fours."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 index, shifted, sign, q0, q1, q2, q3, a, b, c, d;
        and.b32 index, $4, 0x77777777;
        shl.b32 shifted, $4, 4;
        prmt.b32 q0, $6, $10, index;
        prmt.b32 sign, shifted, $4, 0x5140;
        lop3.b32 q0, sign, 0x80808080, q0, 0xEA;
        shr.u32 index, index, 16;
        prmt.b32 q1, $7, $11, index;
        prmt.b32 sign, shifted, $4, 0x7362;
        lop3.b32 q1, sign, 0x80808080, q1, 0xEA;
        and.b32 index, $5, 0x77777777;
        shl.b32 shifted, $5, 4;
        prmt.b32 q2, $8, $12, index;
        prmt.b32 sign, shifted, $5, 0x5140;
        lop3.b32 q2, sign, 0x80808080, q2, 0xEA;
        shr.u32 index, index, 16;
        prmt.b32 q3, $9, $13, index;
        prmt.b32 sign, shifted, $5, 0x7362;
        lop3.b32 q3, sign, 0x80808080, q3, 0xEA;
        prmt.b32 a, q0, q1, 0x5140;
        prmt.b32 b, q2, q3, 0x5140;
        prmt.b32 c, q0, q1, 0x7362;
        prmt.b32 d, q2, q3, 0x7362;
        prmt.b32 $0, a, b, 0x5410;
        prmt.b32 $1, a, b, 0x7632;
        prmt.b32 $2, c, d, 0x5410;
        prmt.b32 $3, c, d, 0x7632;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r",
        [codes, low, high],
        dtype=(gl.float8e4nv,) * 4,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _operand(w_smem, lowered, QUADS: gl.constexpr, SPREAD: gl.constexpr, LEFT: gl.constexpr):
    """Decode ``[CHUNK, 8 W quads]`` codes of W warps to wgmma's left operand ``[32 W, CHUNK]``.

    ``lowered [4 t, 4, 2, 2, 2]`` is ``[CHUNK, W blocks]`` in memory order.
    """
    WARPS: gl.constexpr = gl.num_warps()
    codes = w_smem.load(QUADS)
    spread = lowered.to(gl.int32).reshape([4, 4, 2, 2, 2, WARPS]).permute([1, 2, 3, 0, 4, 5])
    spread = gl.convert_layout(spread.reshape([CHUNK, WARPS]), gl.SliceLayout(2, SPREAD))
    zero = gl.full([CHUNK, WARPS, 8], 0, gl.int32, SPREAD)
    low = (zero + (LOW - spread * 0x01010100)[:, :, None]).reshape([CHUNK, 8 * WARPS])
    high = (zero + (HIGH - spread * 0x01010101)[:, :, None]).reshape([CHUNK, 8 * WARPS])
    low = gl.convert_layout(low, QUADS)
    high = gl.convert_layout(high, QUADS)
    k0, k1, k2, k3 = _decode_quads(codes, low, high)
    # [n, quad, v, u], then n = 32 step + 16 half + 8 j + 2 t + b becomes 32 step + 16 half + 4 t + 2 j + b
    value = gl.join(gl.join(k0, k1), gl.join(k2, k3)).reshape([4, 2, 2, 4, 2, WARPS, 8, 2, 2])
    value = value.permute([8, 5, 7, 6, 0, 1, 3, 2, 4]).reshape([COLUMNS_A_WARP * WARPS, CHUNK])
    return gl.convert_layout(value, LEFT)


@gluon.jit
def _column(k0, row):
    """Return the column k of W for a row of the operand."""
    WARPS: gl.constexpr = gl.num_warps()
    quad = 8 * ((row >> 4) % WARPS) + (row & 7)
    return k0 + 4 * quad + 2 * (row // (16 * WARPS)) + ((row >> 3) & 1)


@gluon.jit
def _copy(
    w_smem, x_smem, w_ptrs, n, inside, x_ptrs, chunk, chunks, N, row_codes, STAGES: gl.constexpr
):
    """Start the copy of a chunk; filled with zeros past the last chunk, and past N."""
    stage = chunk % STAGES
    w_mask = (chunk * CHUNK + n < N)[:, None] & inside[None, :]
    w_chunk = w_ptrs + chunk * (CHUNK * row_codes)
    async_copy.async_copy_global_to_shared(w_smem.index(stage), w_chunk, mask=w_mask)
    there = chunk < chunks
    async_copy.async_copy_global_to_shared(x_smem.index(stage), x_ptrs + chunk * CHUNK, mask=there)
    async_copy.commit_group()


@launched
@gluon.jit(do_not_specialize=["n_rows", "E", "top_k", "r"])  # E specialised to 1 breaks Triton 3.6
def fp8_backward_kernel(x_ptr, x_scale_ptr, w_ptr, lowered_ptr, w_scale_ptr, y_ptr, offs_ptr, order_ptr, h_ptr,
                        up_ptr, bias_ptr, n_rows, E, N, K, x_stride, top_k, r, up_e, up_n, up_r, bias_e,
                        scaling, GROUPED: gl.constexpr, GATHER: gl.constexpr, RANK: gl.constexpr,
                        HAS_BIAS: gl.constexpr, TILE_T: gl.constexpr, STAGES: gl.constexpr,
                        OPERANDS: gl.constexpr, E_SPAN: gl.constexpr):  # fmt: skip
    """Compute ``y [n_rows, K]``; x e4m3 in kernel order, its pitch whole chunks; w int16 ``[E, N, K / 4]``.

    ``x_scale`` fp32, one per row of x; ``lowered`` uint8 ``[E, K / 32, chunks, CHUNK]``; ``w_scale`` fp32
    ``[E, K]``. The rest is as in the forward kernel.
    """
    WARPS: gl.constexpr = gl.num_warps()
    TILE_K: gl.constexpr = COLUMNS_A_WARP * WARPS
    tiles_k = gl.cdiv(K, TILE_K)
    pid = gl.program_id(0)
    k0 = (pid % tiles_k) * TILE_K
    expert, row0, end = find_tile(pid // tiles_k, offs_ptr, n_rows, E, GROUPED, TILE_T, E_SPAN)
    if row0 >= end:
        return
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_T, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    mma_16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_T, 16])
    if expert == E:
        _store(y_ptr, gl.zeros([TILE_K, TILE_T], gl.float32, mma), row0, end, k0, K, TILE_T, TILE_K)
        return

    # A warp's 8 quads are a block; a thread's n are 2 t, 2 t + 1 and those 8, 16, 32, 64 on (t = lane % 4).
    QUADS: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [8, 0], [16, 0], [32, 0], [64, 0]], [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        [[0, 8], [0, 16]] if WARPS == 4 else [[0, 8], [0, 16], [0, 32]], [], [CHUNK, 8 * WARPS],
    )  # fmt: skip
    SPREAD: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0, 0], [8, 0, 0], [16, 0, 0], [32, 0, 0], [64, 0, 0]],
        [[2, 0, 0], [4, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
        [[0, 1, 0], [0, 2, 0]] if WARPS == 4 else [[0, 1, 0], [0, 2, 0], [0, 4, 0]], [],
        [CHUNK, WARPS, 8],
    )  # fmt: skip
    LOWERED: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]], [[32, 0], [64, 0], [0, 0], [0, 0], [0, 0]],
        [[0, 1], [0, 2]] if WARPS == 4 else [[0, 1], [0, 2], [0, 4]], [], [CHUNK, WARPS],
    )  # fmt: skip
    w_shared: gl.constexpr = gl.SwizzledSharedLayout(8, 8 // WARPS, WARPS, [1, 0])
    x_shared: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    w_smem = gl.allocate_shared_memory(gl.int16, [STAGES, CHUNK, 8 * WARPS], w_shared)
    x_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE_T, CHUNK], x_shared)

    COPY_W: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WARPS, WARPS], [WARPS, 1], [1, 0])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    # The compiler must see that this is at least 1: as in the forward kernel.
    chunks = gl.maximum(gl.cdiv(N, CHUNK), 1)
    row_codes = (K // 32) * 8  # visibly a multiple of 8 to the compiler: 16-byte copies
    n = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, COPY_W))
    quad = k0 // 4 + gl.arange(0, 8 * WARPS, layout=gl.SliceLayout(0, COPY_W))
    w_ptrs = w_ptr + (expert.to(gl.int64) * N + n)[:, None] * row_codes + quad[None, :]
    inside = quad < row_codes
    m = gl.minimum(row0 + gl.arange(0, TILE_T, layout=gl.SliceLayout(1, COPY_X)), end - 1)
    if GATHER:
        m = token_of(order_ptr, m, n_rows, top_k)
    n_x = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, COPY_X))
    x_ptrs = x_ptr + (m.to(gl.int64) * x_stride)[:, None] + n_x[None, :]
    place = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, LOWERED))
    block = k0 // 32 + gl.arange(0, WARPS, layout=gl.SliceLayout(0, LOWERED))
    block = gl.minimum(block, K // 32 - 1)
    low_ptrs = lowered_ptr + (expert.to(gl.int64) * (K // 32) + block)[None, :] * (chunks * CHUNK)
    low_ptrs = low_ptrs + place[:, None]

    for i in gl.static_range(STAGES - 1):
        _copy(w_smem, x_smem, w_ptrs, n, inside, x_ptrs, i, chunks, N, row_codes, STAGES)
    lowered = gl.load(low_ptrs)
    acc = warpgroup_mma_init(gl.zeros([TILE_K, TILE_T], gl.float32, mma))
    for i in range(0, chunks, OPERANDS):
        for j in gl.static_range(OPERANDS):
            stage = (i + j) % STAGES
            async_copy.wait_group(STAGES - 2)
            a = _operand(w_smem.index(stage), lowered, QUADS, SPREAD, LEFT)
            lowered = gl.load(low_ptrs + gl.minimum(i + j + 1, chunks - 1) * CHUNK)
            acc = warpgroup_mma(a, x_smem.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(OPERANDS - 1, deps=[acc]))
            chunk = i + j + STAGES - 1
            _copy(w_smem, x_smem, w_ptrs, n, inside, x_ptrs, chunk, chunks, N, row_codes, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)

    expert = opaque(expert)
    k0 = opaque(pid % tiles_k) * TILE_K
    row0 = opaque(row0)
    row: gl.constexpr = gl.SliceLayout(1, mma)
    row_up: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, mma_16, 2))
    acc = finished(
        acc, x_scale_ptr, w_scale_ptr, order_ptr, h_ptr, up_ptr, bias_ptr, expert, row0, end,
        _column(k0, gl.arange(0, TILE_K, layout=row)), _column(k0, gl.arange(0, TILE_K, layout=row_up)),
        K, n_rows, top_k, r, up_e, up_n, up_r, bias_e, scaling, GATHER, RANK, HAS_BIAS, mma, mma_16, TILE_T,
    )  # fmt: skip
    # [u, quad / 8, v, quad % 8] becomes k = 4 quad + 2 u + v
    y = acc.reshape([2, WARPS, 2, 8, TILE_T]).permute([1, 3, 0, 2, 4]).reshape([TILE_K, TILE_T])
    _store(y_ptr, y, row0, end, k0, K, TILE_T, TILE_K)
