"""Products of two operands in blocks, which GPUs of compute capability 10.0 multiply as they are.

``dense`` and ``grouped`` are ops that multiply natively or emulate; ``native`` says whether a device's native
product can be trusted; ``recipe_linear`` is the linear layer of the NVFP4 / MXFP8 recipe, an op a direction.
"""
