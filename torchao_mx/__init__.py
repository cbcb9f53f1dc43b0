"""torchao_mx: training in microscaling formats, as configs for torchao's ``quantize_``."""

from torchao_mx.formats import (
    MXFP4,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    BlockFormat,
    QuantizeSpec,
    ScaleCalculationMode,
)

__all__ = [
    "MXFP4",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "NVFP4",
    "BlockFormat",
    "QuantizeSpec",
    "ScaleCalculationMode",
]
