"""From high precision to blocks and back, one pass over memory each.

``quantize``, ``dequantize``, ``fake_quantize`` and ``quantize_both`` (both axes in one read) are a verb, an op and
its kernels each. What a tile does to its values is in ``tile``, ``both_tile`` and ``bf16x2`` (two bf16 values in a
word); ``amax`` reduces for NVFP4's per-tensor scale.
"""
