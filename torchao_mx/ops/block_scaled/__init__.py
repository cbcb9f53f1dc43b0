"""Products of two block-quantized operands, which GPUs of compute capability 10.0 multiply without decoding.

``dense`` and ``grouped`` are ops that multiply natively or emulate. ``native`` decides whether to trust a
device's native product. ``recipe_linear`` is the NVFP4 / MXFP8 recipe's linear layer, one op per direction.
"""
