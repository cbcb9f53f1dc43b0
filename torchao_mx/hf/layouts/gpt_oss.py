"""gpt-oss's experts in memory and on disk: modules, tensors and shapes.

For a weight ``x @ w[e]`` that the model holds as ``NAME [E, in, out]``, a checkpoint stores::

    NAME_blocks  uint8 [E, out, in / 32, 16]     two 4-bit values per byte, blocks along the input axis
    NAME_scales  uint8 [E, out, in / 32]         E8M0

The packed bytes are therefore the *transpose* of the declared weight: ``MXTensor.from_blocks(...).mT``. The
orientation is never guessed from a shape, which could not tell if H = I. All other tensors are the same in
memory and on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from torchao_mx.errors import check_blocks
from torchao_mx.formats import MXFP4
from torchao_mx.tensor import MXTensor

NAME = "gpt-oss's layout"
WEIGHTS = ("gate_up_proj", "down_proj")
BLOCKS, SCALES = "_blocks", "_scales"
NAN_SCALE = 255
UNPACKED_MODULES = (  # as in the published checkpoints
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights a checkpoint stores as blocks and scales, by name."""
    for name, module in model.named_modules():
        if isinstance(module, GptOssExperts):
            yield name, module


def packed_weights(model: nn.Module) -> list[str]:
    """The names of the weights that a checkpoint stores as blocks and scales."""
    return [f"{name}.{weight}" for name, _ in packed_modules(model) for weight in WEIGHTS]


def is_packed_weight(model: nn.Module, name: str) -> bool:
    """Whether ``name`` is one of :func:`packed_weights`."""
    owner, _, weight = name.rpartition(".")
    return weight in WEIGHTS and isinstance(model.get_submodule(owner), GptOssExperts)


def block_shapes(shape: torch.Size, name: str) -> dict[str, tuple[int, ...]]:
    """``{suffix: shape}`` on disk for the weight ``name`` with ``shape [E, in, out]``.

    Raises:
        ValueError: its input axis is not a multiple of the block size.
    """
    e, c, d = shape
    check_blocks((e, d, c), MXFP4, -1, name)
    scales = (e, d, c // MXFP4.block_size)
    return {BLOCKS: (*scales, MXFP4.block_size // MXFP4.elems_per_byte), SCALES: scales}


def assemble(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Make the frozen parameter ``[E, in, out]`` from a checkpoint's two tensors, without a copy."""
    return nn.Parameter(MXTensor.from_blocks(blocks, scales, dtype).mT, requires_grad=False)


def empty(name: str, shape: torch.Size, dtype: torch.dtype, device: str = "meta") -> torch.Tensor:
    """An empty packed weight ``[E, in, out]``: to be read into or, on ``meta``, to compute sizes."""
    shapes = block_shapes(shape, name).values()
    pair = (torch.empty(s, dtype=torch.uint8, device=device) for s in shapes)
    return MXTensor.from_blocks(*pair, dtype).mT


def stored(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint stores for a parameter, without a copy; blocks and scales if packed."""
    if not isinstance(tensor, MXTensor):
        return {name: tensor}
    blocks, scales = tensor.mT.to_blocks()
    return {name + BLOCKS: blocks, name + SCALES: scales}


def weight_problems(name: str, weight: torch.Tensor) -> list[str]:
    """Why the layout cannot store ``weight [E, in, out]``, or why it could not be loaded again."""
    if not isinstance(weight, MXTensor) or weight.format != MXFP4 or weight.packed_axis != -2:
        what = weight if isinstance(weight, MXTensor) else f"a plain {weight.dtype} tensor"
        problem = (
            f"{name}: {what}; this layout needs {MXFP4.name} with blocks along the input axis: quantize "
            f"experts with MXWeightOnlyConfig()"
        )
        return [problem]
    blocks, scales = stored(name, weight).values()
    return value_problems(name, lambda: blocks, scales)


def value_problems(
    weight: str, blocks: Callable[[], torch.Tensor], scales: torch.Tensor
) -> list[str]:
    """A line if a weight is all zeros or has NaN scales; ``blocks`` is called only if all scales are zero."""
    largest = int(scales.max()) if scales.numel() else None
    if largest == 0 and not blocks().any():
        problem = (
            f"{weight}{BLOCKS}: it and {weight.rpartition('.')[2]}{SCALES} are all zeros, placeholders that "
            f"were never filled; download or export the checkpoint again"
        )
    elif largest == NAN_SCALE:
        places = (scales == NAN_SCALE).nonzero()
        problem = (
            f"{weight}{SCALES}: {len(places)} of {scales.numel()} scales are NaN (byte {NAN_SCALE}), the "
            f"first at {tuple(places[0].tolist())}; the weights were quantized from NaN or Inf, or the file "
            f"is damaged: export it again"
        )
    else:
        return []
    return [problem]


def quantization_config(loaded: Any = None) -> dict[str, Any]:
    """The quantization_config for config.json; it keeps the list of unpacked modules from ``loaded``."""
    unpacked = getattr(loaded, "modules_to_not_convert", None)
    return {
        "quant_method": "mxfp4",
        "modules_to_not_convert": list(unpacked or UNPACKED_MODULES),
    }
