"""block_scaled_mm: the product of two operands quantized in blocks along the reduced axis.

The seam between a recipe and the hardware::

    a [R, C], b [S, C]  ->  a b^T [R, S]

*Native*, on GPUs of compute capability 10.0 and newer (Blackwell): torch's scaled matmul on the packed
operands and their block scales. *Emulated*, everywhere else: the vendor's GEMM on the operands' values, in
the product's dtype. (8-bit tensor cores without block scales take one scale per row, which fits neither
format.) MXFP8 values are exact in bfloat16 (4 significant bits and a power of two), so there the emulated
product is that of the operands themselves, summed in fp32. NVFP4 values are rounded to the product's dtype,
as in quantization-aware training. Callers ask :func:`takes_block_scaled_mm` which form to quantize into.

The native product is untested on GPUs: its dispatch and its operand layout are tested on the CPU, and
``block_scaled/native.py`` checks it before its first use.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torchao.prototype.mx_formats.utils import to_blocked

from torchao_mx.formats import MXFP8_E4M3, NVFP4, BlockFormat, format_by_name
from torchao_mx.ops.block_scaled import native
from torchao_mx.ops.core.launch import bytes_of
from torchao_mx.ops.core.register import define_op
from torchao_mx.ops.packed_mm.matmul import product
from torchao_mx.ops.quantization.dequantize import dequantize_op

ROW_BYTES = 16  # the vendor's GEMM needs rows of packed elements in multiples of this


class Operand(NamedTuple):
    """A matrix ``[R, C]`` in blocks along C: ``packed``, or as ``values [R, C]``.

    ``packed`` is ``(qdata, scale)`` with C padded with zeros to whole blocks.
    """

    format: BlockFormat
    packed: tuple[torch.Tensor, torch.Tensor] | None = None
    per_tensor_scale: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def decoded(self, dtype: torch.dtype, columns: int) -> torch.Tensor:
        """Return the values ``[R, columns]``; packed ones as the transpose of a contiguous matrix.

        A plain layer's GEMM for the weight's gradient has its operands in that layout.
        """
        if self.values is not None:
            return self.values
        name, pts = self.format.name, self.per_tensor_scale
        return dequantize_op(*self.packed, name, dtype, -2, pts)[:columns].mT


def takes_block_scaled_mm(
    x: torch.Tensor, columns: int, formats: tuple[BlockFormat, BlockFormat]
) -> bool:
    """Whether products in x's dtype that reduce ``columns`` elements run natively for these formats.

    torch's scaled matmul returns bfloat16 here, and does not multiply two E5M2 operands.
    """
    return (
        x.dtype == torch.bfloat16
        and all(columns % (ROW_BYTES * fmt.elems_per_byte) == 0 for fmt in formats)
        and any(fmt.elem_dtype != torch.float8_e5m2 for fmt in formats)
        and _is_native(x.device)
    )


class Arguments(NamedTuple):
    """The op's arguments, in its schema's order: packed operands ``[R, C]`` and ``[S, C]``, and y's dtype."""

    a_qdata: torch.Tensor
    a_scale: torch.Tensor
    a_per_tensor: torch.Tensor | None
    b_qdata: torch.Tensor
    b_scale: torch.Tensor
    b_per_tensor: torch.Tensor | None
    a_format: str
    b_format: str
    dtype: torch.dtype


def _native_product(*args: Any) -> torch.Tensor:
    t = Arguments(*args)
    a, b = format_by_name(t.a_format), format_by_name(t.b_format)
    blocked_a, blocked_b = (to_blocked(bytes_of(scale)) for scale in (t.a_scale, t.b_scale))
    scales_a, recipes_a, swizzles_a = scaling_of(a, blocked_a, t.a_per_tensor)
    scales_b, recipes_b, swizzles_b = scaling_of(b, blocked_b, t.b_per_tensor)
    return F.scaled_mm(
        t.a_qdata.view(a.elem_dtype),
        t.b_qdata.view(b.elem_dtype).t(),
        scales_a,
        recipes_a,
        scales_b,
        recipes_b,
        swizzles_a,
        swizzles_b,
        output_dtype=t.dtype,
    )


def scaling_of(
    fmt: BlockFormat, blocked: torch.Tensor, per_tensor_scale: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[F.ScalingType], list[F.SwizzleType]]:
    """Return the scales for ``F.scaled_mm``: block scales in tiles of 128 x 4, then the per-tensor scale.

    The tiles are cuBLAS's "1D block scaling factors layout", which torchao's ``to_blocked`` produces from
    bytes.
    """
    by_block = F.ScalingType.BlockWise1x16 if fmt.block_size == 16 else F.ScalingType.BlockWise1x32
    scales = [blocked.view(fmt.scale_dtype)]
    recipes, swizzles = [by_block], [F.SwizzleType.SWIZZLE_32_4_4]
    if per_tensor_scale is not None:
        scales.append(per_tensor_scale.reshape(-1))
        recipes.append(F.ScalingType.TensorWise)
        swizzles.append(F.SwizzleType.NO_SWIZZLE)
    return scales, recipes, swizzles


def _decoded(*args: Any) -> torch.Tensor:
    t = Arguments(*args)
    a = dequantize_op(t.a_qdata, t.a_scale, t.a_format, t.dtype, -1, t.a_per_tensor)
    b = dequantize_op(t.b_qdata, t.b_scale, t.b_format, t.dtype, -1, t.b_per_tensor)
    return a @ b.mT


def _fake(*args: Any) -> torch.Tensor:
    t = Arguments(*args)
    return t.a_qdata.new_empty((t.a_qdata.shape[0], t.b_qdata.shape[0]), dtype=t.dtype)


def _cuda(*args: Any) -> torch.Tensor:
    return (_native_product if _is_native(args[0].device) else _decoded)(*args)


# An op keeps torch.compile out: inductor's lowering of scaled_mm refuses swizzled scales.
block_scaled_mm_op = define_op(
    "block_scaled_mm",
    "(Tensor a_qdata, Tensor a_scale, Tensor? a_per_tensor, Tensor b_qdata, Tensor b_scale,"
    " Tensor? b_per_tensor, str a_format, str b_format, ScalarType dtype) -> Tensor",
    cpu=_decoded,
    cuda=_cuda,
    fake=_fake,
)


def block_scaled_mm(
    a: Operand, b: Operand, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``a b^T + bias``, ``[R, S]`` in ``dtype``; native if both operands are packed and the GPU can.

    Args:
        a: ``[R, C]``.
        b: ``[S, C]``.
        dtype: the dtype of the product and of the operands' values.
        bias: ``[S]``, in ``dtype``.
    """
    if a.values is None and b.values is None:
        y = block_scaled_mm_op(
            *a.packed,
            a.per_tensor_scale,
            *b.packed,
            b.per_tensor_scale,
            a.format.name,
            b.format.name,
            dtype,
        )
        return y if bias is None else y + bias
    columns = (b if a.values is None else a).values.shape[1]
    return product(a.decoded(dtype, columns), b.decoded(dtype, columns), bias)


def _examples(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of native and decoded products, with rows that do not fill whole scale tiles."""
    pairs = []
    for fmt in (NVFP4, MXFP8_E4M3):
        a, b = (native.example(fmt, device, rows, 192) for rows in (203, 160))
        args = (*a, *b, fmt.name, fmt.name, torch.bfloat16)
        pairs.append((_native_product(*args), _decoded(*args)))
    return pairs


_is_native = native.seam("The product of block-scaled operands", _examples)
