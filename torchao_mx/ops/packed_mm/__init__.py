"""Products with a frozen packed weight, with and without adapters: one op, several ways to compute it.

The verbs are in ``matmul`` (plain) and ``lora``; both check and call the op of ``op``, whose forward and backward
choose by ``strategy``:

    portable     decode in the registers of one Triton GEMM: every format, dtype and GPU from Ampere up
    hopper/      the same of MXFP4 on Hopper, in Gluon, by wgmma: in bf16 and in e4m3
    unpack       decode into a scratch, then the vendor's GEMM
    fp8/         in 8 bits, lossless for the weight: rows of x quantized, weights decoded to e4m3

``epilogue`` adds what a vendor's GEMM leaves out (adapters, bias, zeros of unassigned rows), and ``exact_fp4``
multiplies two MXFP4 operands on 8-bit tensor cores, exactly.
"""
