"""Training recipes: forward and backward products in different block formats, through ``quantize_``."""

from torchao_mx.recipes.config import NVFP4ForwardMXFP8BackwardConfig
from torchao_mx.recipes.experts import NVFP4MXFP8Experts
from torchao_mx.recipes.handler import check_recipe_module
from torchao_mx.recipes.linear import NVFP4MXFP8Linear

__all__ = [
    "NVFP4ForwardMXFP8BackwardConfig",
    "NVFP4MXFP8Experts",
    "NVFP4MXFP8Linear",
    "check_recipe_module",
]
