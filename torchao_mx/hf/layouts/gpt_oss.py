"""gpt-oss's experts, in memory and on disk: which modules, which tensors, which shapes.

For a weight ``x @ w[e]`` that the model holds as ``NAME [E, in, out]`` a checkpoint has::

    NAME_blocks  uint8 [E, out, in / 32, 16]     two 4-bit values a byte, blocks along the input axis
    NAME_scales  uint8 [E, out, in / 32]         E8M0

so the packed bytes are the *transpose* of what the model declares: ``MXTensor.from_blocks(...).mT``. Nothing
here looks at a shape to tell which way round a weight is; where H = I it could not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from torchao_mx.errors import check_blocks
from torchao_mx.formats import MXFP4
from torchao_mx.hf.transformers_internals import tied_keys
from torchao_mx.tensor import MXTensor
from torchao_mx.torch_internals import children_of

WEIGHTS = ("gate_up_proj", "down_proj")
BLOCKS, SCALES = "_blocks", "_scales"
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


def skeleton_of(build: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """``build(config)`` without memory: what the model's tensors are called, and their shapes."""
    with torch.device("meta"):
        return build(copy.deepcopy(config))


def tied_names(model: PreTrainedModel) -> set[str]:
    """The tensors that are others under a second name, and so not in a checkpoint."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return tied_keys(model)


def has_owner(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor that ``model`` lacks belongs to a module that it has, and changes what that computes.

    A bias that the module was built without, or a layer beyond the last one: yes. A part beside the layers,
    such as an image encoder, a head for another task or, as DeepSeek-V3 counts them, layers that predict
    further tokens: no.
    """
    *owners, _ = parts = name.split(".")
    module, depth = model, 0
    while depth < len(owners) and children_of(module).get(owners[depth]) is not None:
        module = children_of(module)[owners[depth]]
        depth += 1
    if isinstance(module, nn.ModuleList) and parts[depth].isdecimal():
        more = getattr(model.config, "num_nextn_predict_layers", None)
        more = more if isinstance(more, int) else 0
        further = {str(i) for i in range(len(module), len(module) + more)}
        return parts[depth] not in further
    holds_layers = any(isinstance(child, nn.ModuleList) for child in module.modules())
    return any(part.isdecimal() for part in parts[:depth]) or not holds_layers
