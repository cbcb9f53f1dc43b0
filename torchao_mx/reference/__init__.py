"""Every op in plain PyTorch: its definition, its CPU implementation and the oracle for the kernels."""

from torchao_mx.reference.mm import (
    Added,
    Rows,
    add_low_rank,
    check_offsets,
    check_order,
    combine_backward,
    gram,
    group_sum,
    low_rank,
    mm,
    product,
    rows_per_token,
    sum_rows,
)
from torchao_mx.reference.quantize import dequantize, fake_quantize, per_tensor_scale, quantize
from torchao_mx.reference.recipes import (
    BothDirections,
    dropped_bits,
    quantize_both,
    random_words,
    recipe_products,
    round_stochastically,
)
from torchao_mx.reference.swiglu import swiglu, swiglu_backward

__all__ = [
    "Added",
    "BothDirections",
    "Rows",
    "add_low_rank",
    "check_offsets",
    "check_order",
    "combine_backward",
    "dequantize",
    "dropped_bits",
    "fake_quantize",
    "gram",
    "group_sum",
    "low_rank",
    "mm",
    "per_tensor_scale",
    "product",
    "quantize",
    "quantize_both",
    "random_words",
    "recipe_products",
    "round_stochastically",
    "rows_per_token",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
]
