"""The public ops: ``torch.library`` custom ops; ``reference/`` serves the CPU, Triton serves CUDA."""

from torchao_mx.ops.moe.combine import combine
from torchao_mx.ops.moe.routing import Routing, route
from torchao_mx.ops.moe.swiglu import swiglu
from torchao_mx.ops.packed_mm.lora import lora_grouped_mm, lora_matmul
from torchao_mx.ops.packed_mm.matmul import grouped_mm, matmul
from torchao_mx.ops.quantization.dequantize import dequantize
from torchao_mx.ops.quantization.fake_quantize import fake_quantize
from torchao_mx.ops.quantization.quantize import per_tensor_scale, quantize, quantize_with_values
from torchao_mx.ops.quantization.quantize_both import BothDirections, quantize_both

__all__ = [
    "BothDirections",
    "Routing",
    "combine",
    "dequantize",
    "fake_quantize",
    "grouped_mm",
    "lora_grouped_mm",
    "lora_matmul",
    "matmul",
    "per_tensor_scale",
    "quantize",
    "quantize_both",
    "quantize_with_values",
    "route",
    "swiglu",
]
