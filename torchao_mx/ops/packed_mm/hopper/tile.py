"""Device functions of the Hopper kernels (Gluon): a program's rows, and MXFP4 decoded for wgmma.

A decoded weight goes straight from the shared-memory word to the registers of a wgmma operand: the layouts
below give each thread the words whose nibbles it feeds to the tensor core. Speed depends on the number of
instructions per element, so the decode is written in PTX. Per pair of elements it takes one mask, one
multiplication that puts sign and magnitude in place, one mask, and one bf16x2 multiplication by the scale.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# An e2m1 code in bits 8 .. 6 and 15 of a bf16 is its value times 2**-126, subnormals included. One factor
# undoes that and applies the block's scale: 2**(126 + byte - 127), which bf16 holds up to byte 128. So WINDOW
# powers of two are taken out of the factor and given back to the fp32 sum. Exact for bytes 11 .. 144 (scales
# 2**-116 .. 2**17). Smaller bytes are weights below 2**-114, where bf16's subnormals end. Larger bytes, and
# NaN, make a program start again with the exact decode.
WINDOW = gl.constexpr(16)
_SCALE_OFFSET = gl.constexpr((126 - 16) << 7)
_PAIR = gl.constexpr(0x10001)


@gluon.jit
def find_tile(slot, offs_ptr, n_rows, E, GROUPED: gl.constexpr, TILE: gl.constexpr,
              E_SPAN: gl.constexpr):  # fmt: skip
    """Return (expert, first row, end row) of the tile ``slot``; E for unassigned rows; may be empty.

    Expert e's tiles have the slots ``e + start // TILE + 0, 1, ...``: these suffice, are in order, and need
    no prefix sum. There are ``E + n_rows // TILE + 1`` slots. Whatever the offsets hold, no row
    outside ``0 .. n_rows`` is named.
    """
    if GROUPED:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        e = gl.arange(0, E_SPAN, layout=layout)
        start = gl.load(offs_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
        mine = (e + start // TILE <= slot) & (e <= E)
        expert = gl.maximum(gl.sum(mine.to(gl.int32), axis=0) - 1, 0)
        first = gl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
        end = gl.load(offs_ptr + expert, mask=expert < E, other=n_rows)
        first = gl.minimum(gl.maximum(first, 0), n_rows)
        end = gl.minimum(end, n_rows)
        step = slot - expert - first // TILE
        row = gl.where(step < 0, end, first + step * TILE)
    else:
        expert = slot * 0
        row = slot * TILE
        end = n_rows
    return expert, row, end


@gluon.jit
def token_of(order_ptr, row, n_rows, top_k):
    """Return the rows of x that grouped rows read: ``order[row] // top_k``.

    They are clamped to x's rows, so that a bad order reads no foreign memory.
    """
    slot = gl.load(order_ptr + row)
    return gl.minimum(gl.maximum(slot, 0), n_rows - 1) // top_k


@gluon.jit
def part_start(chunks, split, SPLITS: gl.constexpr):
    """Return the first chunk of one of SPLITS parts of a reduction; parts differ by at most one chunk."""
    return chunks * split // SPLITS


@gluon.jit
def opaque(x):
    """Hide x from the compiler: results that depend on it are computed here, not kept through a loop."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def prmt(a, b, SELECT: gl.constexpr):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, " + SELECT + ";", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def max_u16x2(a, b):
    return gl.inline_asm_elementwise(
        "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def windowed_scale(bytes_in_halves):
    """Convert two scale bytes, one in each half of an int32, to two bf16 factors of ``decode_pairs``."""
    return bytes_in_halves * 128 + _SCALE_OFFSET * _PAIR


@gluon.jit
def exact_scale(byte):
    """Return the bf16 bits (int32) of ``2**(byte - 127)``; NaN for 255."""
    return gl.where(byte == 255, 0x7FC0, gl.maximum(byte << 7, 0x40))


@gluon.jit
def overflows(top):
    """Whether the largest factor seen, a running ``max_u16x2``, was past the window."""
    flat = gl.reshape(gl.maximum(top & 0xFFFF, (top >> 16) & 0xFFFF), [top.numel])
    return gl.max(flat, axis=0) >= 0x7F80


@gluon.jit
def decode_pairs(word, scale, EXACT: gl.constexpr):
    """Decode to ``(l0, h0, l1, h1, l2, h2, l3, h3)``: code i of the word's low and of its high half, as bf16.

    ``scale`` holds the two factors: windowed, or with EXACT those of ``exact_scale``.
    """
    if EXACT:
        value = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, h, c;
            mov.b32 c, 0x7E807E80;
            shr.u32 h, $8, 8;
            and.b32 t, $8, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $9; mov.b32 {$0, $1}, t;
            and.b32 t, $8, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $9; mov.b32 {$2, $3}, t;
            and.b32 t, h, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $9; mov.b32 {$4, $5}, t;
            and.b32 t, h, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, c; mul.rn.bf16x2 t, t, $9; mov.b32 {$6, $7}, t;
            }
            """,
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r",
            [word, scale],
            dtype=(gl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        value = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, h;
            shr.u32 h, $8, 8;
            and.b32 t, $8, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, $9; mov.b32 {$0, $1}, t;
            and.b32 t, $8, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, $9; mov.b32 {$2, $3}, t;
            and.b32 t, h, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, $9; mov.b32 {$4, $5}, t;
            and.b32 t, h, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 t, t, 0x81C081C0;
            mul.rn.bf16x2 t, t, $9; mov.b32 {$6, $7}, t;
            }
            """,
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r",
            [word, scale],
            dtype=(gl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    return value
