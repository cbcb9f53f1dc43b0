"""gpt-oss's experts, in memory and on disk: which modules, which tensors, which shapes.

For a weight ``x @ w[e]`` that the model holds as ``NAME [E, in, out]`` a checkpoint has::

    NAME_blocks  uint8 [E, out, in / 32, 16]     two 4-bit values a byte, blocks along the input axis
    NAME_scales  uint8 [E, out, in / 32]         E8M0

so the packed bytes are the *transpose* of what the model declares: ``MXTensor.from_blocks(...).mT``. Nothing
here looks at a shape to tell which way round a weight is; where H = I it could not. All else is the same in
both.
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
    """The modules whose weights a checkpoint holds in blocks and scales, by name."""
    for name, module in model.named_modules():
        if isinstance(module, GptOssExperts):
            yield name, module


def packed_weights(model: nn.Module) -> list[str]:
    """The names of the weights that a checkpoint holds in blocks and scales."""
    return [f"{name}.{weight}" for name, _ in packed_modules(model) for weight in WEIGHTS]


def is_packed_weight(model: nn.Module, name: str) -> bool:
    """Whether ``name`` is one of :func:`packed_weights`."""
    owner, _, weight = name.rpartition(".")
    return weight in WEIGHTS and isinstance(model.get_submodule(owner), GptOssExperts)


def block_shapes(shape: torch.Size, name: str) -> dict[str, tuple[int, ...]]:
    """``{suffix: shape}`` on disk of the weight ``name`` of ``shape [E, in, out]``.

    Raises:
        ValueError: its input axis is not whole blocks.
    """
    e, c, d = shape
    check_blocks((e, d, c), MXFP4, -1, name)
    scales = (e, d, c // MXFP4.block_size)
    return {BLOCKS: (*scales, MXFP4.block_size // MXFP4.elems_per_byte), SCALES: scales}


def assemble(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    """The frozen parameter ``[E, in, out]`` of a checkpoint's two tensors; no copy is made."""
    return nn.Parameter(MXTensor.from_blocks(blocks, scales, dtype).mT, requires_grad=False)


def empty(name: str, shape: torch.Size, dtype: torch.dtype, device: str = "meta") -> torch.Tensor:
    """A packed weight ``[E, in, out]`` to be read into, or on ``meta`` to tell its sizes."""
    shapes = block_shapes(shape, name).values()
    pair = (torch.empty(s, dtype=torch.uint8, device=device) for s in shapes)
    return MXTensor.from_blocks(*pair, dtype).mT


def stored(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a checkpoint has for a parameter, without a copy; blocks and scales of a packed one."""
    if not isinstance(tensor, MXTensor):
        return {name: tensor}
    blocks, scales = tensor.mT.to_blocks()
    return {name + BLOCKS: blocks, name + SCALES: scales}


def weight_problems(name: str, weight: torch.Tensor) -> list[str]:
    """Why the layout cannot hold ``weight [E, in, out]``, or why what is stored could not be loaded."""
    if not isinstance(weight, MXTensor) or weight.format != MXFP4 or weight.packed_axis != -2:
        what = weight if isinstance(weight, MXTensor) else f"a plain {weight.dtype} tensor"
        problem = (
            f"{name}: {what}; this layout holds it in {MXFP4.name}, in blocks along the input axis: "
            f"quantize experts with MXWeightOnlyConfig()"
        )
        return [problem]
    blocks, scales = stored(name, weight).values()
    return value_problems(name, lambda: blocks, scales)


def value_problems(
    weight: str, blocks: Callable[[], torch.Tensor], scales: torch.Tensor
) -> list[str]:
    """A line for a weight that is zeros throughout, or some of whose scales are NaN; ``blocks`` if needed."""
    largest = int(scales.max()) if scales.numel() else None
    if largest == 0 and not blocks().any():
        problem = (
            f"{weight}{BLOCKS}: it and {weight.rpartition('.')[2]}{SCALES} are zero throughout, "
            f"placeholders that nothing was written to; download or export the checkpoint again"
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
    """What config.json says; of modules that are not packed, what a config that was ``loaded`` said."""
    unpacked = getattr(loaded, "modules_to_not_convert", None)
    return {
        "quant_method": "mxfp4",
        "modules_to_not_convert": list(unpacked or UNPACKED_MODULES),
    }
