"""A model's tensors as a checkpoint in gpt-oss's layout names them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from torchao_mx.formats import MXFP4
from torchao_mx.hf._checkpoint import raise_problems, value_problems
from torchao_mx.hf._layout import BLOCKS, SCALES, packed_weights, skeleton_of, tied_names
from torchao_mx.tensor import MXTensor


def packed_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's ``state_dict`` with blocks and scales, views, for each packed weight; tied tensors once.

    Raises:
        NotImplementedError: the model has no experts of a class known here.
        ValueError: one line for each tensor that the layout has no place for, or that a loader would refuse.
    """
    skeleton = skeleton_of(type(model), model.config)
    weights = packed_weights(skeleton)
    if not weights:
        raise NotImplementedError(
            f"{type(model).__name__} has no experts that MXFP4 checkpoints hold; those of gpt-oss are held. "
            f"Use the model's own save_pretrained"
        )
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    tied = tied_names(model)
    problems = []
    state: dict[str, torch.Tensor] = {}
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if name not in shapes or tensor.shape != shapes[name]:
            problems.append(
                f"{name}: {type(model).__name__} has no such tensor of shape {tuple(tensor.shape)}; unload "
                f"adapters, convert what quantization-aware training prepared"
            )
        elif name in weights:
            problems += _add_packed(state, name, tensor)
        elif isinstance(tensor, MXTensor):
            problems.append(
                f"{name}: {tensor} is packed, and this layout packs experts only; dequantize it, or leave "
                f"such layers out with quantize_'s filter_fn"
            )
        elif name not in tied:
            state[name] = tensor
    problems += [f"{name}: missing from the model" for name in shapes.keys() - tensors.keys()]
    if problems:
        raise_problems(problems, f"{type(model).__name__} cannot be saved in gpt-oss's layout")
    return state


def _add_packed(state: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> list[str]:
    """Blocks and scales of ``weight [E, in, out]`` into ``state``, or what is wrong with it."""
    if not isinstance(weight, MXTensor) or weight.format != MXFP4 or weight.packed_axis != -2:
        what = weight if isinstance(weight, MXTensor) else f"a plain {weight.dtype} tensor"
        problem = (
            f"{name}: {what}; this layout holds it in {MXFP4.name}, in blocks along the input axis: "
            f"quantize experts with MXWeightOnlyConfig()"
        )
        return [problem]
    blocks, scales = weight.mT.to_blocks()
    state[name + BLOCKS], state[name + SCALES] = blocks, scales
    return value_problems(name, lambda: blocks, scales)
