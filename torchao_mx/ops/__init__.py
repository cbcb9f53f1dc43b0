"""The public ops: ``torch.library`` custom ops, the CPU served by ``reference/``, CUDA by Triton."""

from torchao_mx.ops.combine import combine
from torchao_mx.ops.dequantize import dequantize
from torchao_mx.ops.fake_quantize import fake_quantize
from torchao_mx.ops.linear import lora_grouped_mm, lora_matmul
from torchao_mx.ops.matmul import grouped_mm, matmul
from torchao_mx.ops.quantize import per_tensor_scale, quantize, quantize_with_values
from torchao_mx.ops.quantize_both import BothDirections, quantize_both
from torchao_mx.ops.routing import Routing, route
from torchao_mx.ops.swiglu import swiglu

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
