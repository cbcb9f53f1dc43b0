"""Conversion from high precision to blocks and back, in one pass over memory each.

``quantize``, ``dequantize``, ``fake_quantize`` and ``quantize_both`` (both axes in one read) each hold a
verb, its op and its kernels. ``tile``, ``both_tile`` and ``bf16x2`` (two bf16 values per word) compute on the
values of a tile; ``amax`` reduces for NVFP4's per-tensor scale.
"""
