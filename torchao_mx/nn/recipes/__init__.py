"""Training recipes: forward and backward products in different block formats, through ``quantize_``."""

from torchao_mx.nn.recipes.config import NVFP4ForwardMXFP8BackwardConfig
from torchao_mx.nn.recipes.experts import NVFP4MXFP8Experts
from torchao_mx.nn.recipes.handler import check_recipe_module
from torchao_mx.nn.recipes.linear import NVFP4MXFP8Linear

__all__ = [
    "NVFP4ForwardMXFP8BackwardConfig",
    "NVFP4MXFP8Experts",
    "NVFP4MXFP8Linear",
    "check_recipe_module",
]
