"""Other implementations of a product with MXFP4 experts, measured where they are installed.

``triton_kernels`` (of the Triton repository) computes y from the packed weight, forward alone and without
adapters. Its Python interface changes between releases; one that this file does not know raises, and the
benchmark leaves it out with a note.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch

from torchao_mx.formats import MXFP4

Product = Callable[[torch.Tensor], torch.Tensor]


def has_triton_kernels() -> bool:
    return importlib.util.find_spec("triton_kernels") is not None


def triton_kernels_product(
    qdata: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor, order: torch.Tensor, top_k: int
) -> Product:
    """``x [T, K] -> y [R, N]`` with W ``[E, N, K]`` in the layout that it likes."""
    from triton_kernels.matmul import PrecisionConfig, matmul
    from triton_kernels.tensor import (
        FP4,
        convert_layout,
        make_ragged_tensor_metadata,
        wrap_torch_tensor,
    )
    from triton_kernels.tensor_details import layout

    value_layout = layout.make_default_matmul_mxfp4_w_layout(mx_axis=-2)
    scale_layout = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2, num_warps=8)
    weight = convert_layout(wrap_torch_tensor(qdata.mT, dtype=FP4), value_layout)
    scale = convert_layout(wrap_torch_tensor(scale.view(torch.uint8).mT), scale_layout)
    options = {"b_mx_scale": scale, "b_microblock_size": MXFP4.block_size}
    known = {field.name for field in dataclasses.fields(PrecisionConfig)}
    precision = PrecisionConfig(**{key: options[key] for key in options if key in known})
    sizes = offs.diff(prepend=offs.new_zeros(1)).int()
    metadata = make_ragged_tensor_metadata(sizes, order.shape[0])
    tokens = (order // top_k).int()

    def product(x: torch.Tensor) -> torch.Tensor:
        return matmul(
            x, weight, None, a_ragged_metadata=metadata, gather_indx=tokens,
            precision_config=precision,
        )  # fmt: skip

    return product
