"""Plain PyTorch: the definition of every op, what runs on the CPU, and the oracle of the kernels."""

from torchao_mx.reference.quantize import dequantize, fake_quantize, per_tensor_scale, quantize

__all__ = ["dequantize", "fake_quantize", "per_tensor_scale", "quantize"]
