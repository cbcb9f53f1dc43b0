"""Products with a frozen packed weight, with and without adapters: one op, several ways to compute it.

The verbs are in ``matmul`` (plain) and ``lora``. Both check their arguments and call the op in ``op``, whose
forward and backward choose by ``strategy``:

    portable     decode in the registers of one Triton GEMM: every format, dtype and GPU from Ampere on
    hopper/      the same for MXFP4 on Hopper, in Gluon, by wgmma: in bf16 and in e4m3
    unpack       decode into a scratch buffer, then call the vendor's GEMM
    fp8/         in 8 bits, lossless for the weight: quantize rows of x, decode weights to e4m3

``epilogue`` adds the parts that a vendor's GEMM lacks (adapters, bias, zeros in unassigned rows), and
``exact_fp4`` multiplies two MXFP4 operands on 8-bit tensor cores, exactly.
"""
