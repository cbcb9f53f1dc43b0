"""MXFP4 products on Hopper: packed words are decoded into the registers that wgmma reads.

``product`` chooses and launches these kernels. ``forward`` reduces over K, ``backward`` over N; ``fp8_forward``
and ``fp8_backward`` do so in e4m3. ``tile`` finds a program's expert, rows and tokens.
"""
