"""Block formats: an element type, a block size and a scale type.

The rest of the library takes its constants from a :class:`BlockFormat`; no bare ``6.0`` or ``32``
appears elsewhere. Sources: OCP Microscaling Formats (MX) v1.0, sections 5.2 and 5.3, for the element
and scale types; NVIDIA's NVFP4 for the 16-element block with an E4M3 scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode

__all__ = [
    "MXFP4",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "NVFP4",
    "BlockFormat",
    "QuantizeSpec",
    "ScaleCalculationMode",
    "format_by_name",
]


@dataclass(frozen=True)
class BlockFormat:
    """A tensor format in which ``block_size`` neighbouring elements share one scale.

    An element is a small float of ``exponent_bits`` and ``mantissa_bits`` with the usual bias
    ``2**(exponent_bits - 1) - 1`` and subnormals. A value is ``element * scale``, times the per-tensor
    scale if the format has one.

    Attributes:
        name: the format's name in messages, op schemas and command lines.
        elem_dtype: torch's dtype for the elements; ``torch.float4_e2m1fn_x2`` for 4-bit elements.
        exponent_bits: width of the element's exponent field.
        mantissa_bits: width of the element's mantissa field.
        elem_max: the largest finite element.
        block_size: the number of elements that share a scale.
        scale_dtype: ``torch.float8_e8m0fnu`` (a power of two) or ``torch.float8_e4m3fn``.
        has_per_tensor_scale: whether a second, fp32 scale covers the tensor, or each of its experts.

    Example:
        >>> from torchao_mx import MXFP4, NVFP4
        >>> MXFP4.elem_max, MXFP4.block_size, MXFP4.bits_per_element
        (6.0, 32, 4.25)
        >>> NVFP4.scale_dtype
        torch.float8_e4m3fn
    """

    name: str
    elem_dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int
    elem_max: float
    block_size: int
    scale_dtype: torch.dtype
    has_per_tensor_scale: bool = False

    @property
    def elem_bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def elems_per_byte(self) -> int:
        return 8 // self.elem_bits

    @property
    def bits_per_element(self) -> float:
        """Storage per element, including the block scale (the per-tensor scale is negligible)."""
        return self.elem_bits + 8 / self.block_size

    @property
    def exponent_bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal element; subnormals have the spacing of its binade."""
        return 1 - self.exponent_bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest element's binade: 2 for E2M1, 8 for E4M3, 15 for E5M2."""
        return {2: 2, 4: 8, 5: 15}[self.exponent_bits]

    @property
    def nan_code(self) -> int:
        """The element that fills a block whose scale is NaN: every bit set except the sign.

        It is NaN if the element type has one. In E2M1 it is the largest element: even a decoder that
        reads scale byte 255 as 2**128 then gets a value that cannot be mistaken for data.
        """
        return (1 << (self.elem_bits - 1)) - 1

    @property
    def qdata_dtype(self) -> torch.dtype:
        """dtype of the packed elements: uint8 (two per byte, low nibble first) or the fp8 dtype."""
        return torch.uint8 if self.elem_bits == 4 else self.elem_dtype

    @classmethod
    def from_dtype(cls, dtype: torch.dtype, block_size: int = 32) -> BlockFormat:
        """Return the format with this element dtype and block size, as torchao's configs name formats.

        Raises:
            TypeError: ``dtype`` is not a dtype.
            ValueError: no format has this element dtype with this block size.
        """
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype={dtype!r} is not a torch.dtype; use one of {_dtype_choices()}")
        for fmt in _FORMATS.values():
            if (fmt.elem_dtype, fmt.block_size) == (dtype, block_size):
                return fmt
        raise ValueError(
            f"no block format has dtype={dtype} with block_size={block_size}; use one of "
            f"{_dtype_choices()}"
        )

    def __str__(self) -> str:
        return self.name


MXFP4 = BlockFormat("mxfp4", torch.float4_e2m1fn_x2, 2, 1, 6.0, 32, torch.float8_e8m0fnu)
MXFP8_E4M3 = BlockFormat("mxfp8_e4m3", torch.float8_e4m3fn, 4, 3, 448.0, 32, torch.float8_e8m0fnu)
MXFP8_E5M2 = BlockFormat("mxfp8_e5m2", torch.float8_e5m2, 5, 2, 57344.0, 32, torch.float8_e8m0fnu)
NVFP4 = BlockFormat(
    "nvfp4", torch.float4_e2m1fn_x2, 2, 1, 6.0, 16, torch.float8_e4m3fn, has_per_tensor_scale=True
)

_FORMATS = {fmt.name: fmt for fmt in (MXFP4, MXFP8_E4M3, MXFP8_E5M2, NVFP4)}


def format_by_name(name: str) -> BlockFormat:
    """Return the format called ``name``; op schemas carry formats as strings.

    Raises:
        ValueError: no format has this name.
    """
    if name not in _FORMATS:
        raise ValueError(f"no block format is called {name!r}; use one of {sorted(_FORMATS)}")
    return _FORMATS[name]


def _dtype_choices() -> str:
    return ", ".join(f"{f.elem_dtype} with block_size {f.block_size}" for f in _FORMATS.values())


@dataclass(frozen=True)
class QuantizeSpec:
    """How to quantize a tensor: the format, and how to choose its block scales.

    ``scaling_mode`` says how an E8M0 scale follows from a block's largest magnitude. NVFP4 has only
    one rule and ignores it.

    Example:
        >>> from torchao_mx import MXFP4, QuantizeSpec
        >>> print(QuantizeSpec(MXFP4))
        mxfp4 (rceil)
    """

    format: BlockFormat
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL

    def __post_init__(self) -> None:
        if not isinstance(self.format, BlockFormat):
            raise TypeError(
                f"format={self.format!r} is not a BlockFormat; use one of "
                f"{', '.join(n.upper() for n in _FORMATS)} from torchao_mx"
            )
        check_scaling_mode(self.scaling_mode)

    def __str__(self) -> str:
        if self.format.has_per_tensor_scale:
            return self.format.name
        return f"{self.format.name} ({self.scaling_mode.value})"


def check_scaling_mode(mode: object) -> None:
    """Raise TypeError unless ``mode`` is a :class:`ScaleCalculationMode` of torchao."""
    if not isinstance(mode, ScaleCalculationMode):
        raise TypeError(
            f"scaling_mode={mode!r} is not a ScaleCalculationMode; use one of "
            f"{', '.join(f'ScaleCalculationMode.{m.name}' for m in ScaleCalculationMode)}"
        )
