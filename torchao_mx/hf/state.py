"""A model's tensors as a checkpoint in gpt-oss's layout names them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from torchao_mx.formats import MXFP4
from torchao_mx.hf.checkpoint import raise_problems, value_problems
from torchao_mx.hf.layouts.gpt_oss import BLOCKS, SCALES, packed_weights, skeleton_of, tied_names
from torchao_mx.nn.lora import MXLoRAExperts, MXLoRALinear
from torchao_mx.tensor import MXTensor


def packed_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's ``state_dict`` with blocks and scales, views, for each packed weight; tied tensors once.

    Raises:
        NotImplementedError, ValueError: as :func:`checked_state`.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in checked_state(model).items():
        if tensor.is_meta:
            tensor = model.get_parameter(name).dequantize()
        state |= stored(name, tensor)
    return state


def checked_state(model: PreTrainedModel, merged: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The model's ``state_dict``, of tensors that the layout holds; tied tensors once.

    Args:
        model: all its experts' weights packed. In the place of one that the layout holds unpacked, a linear
            layer's, is an empty tensor on ``meta``, to be dequantized when it is written.
        merged: names of weights into which adapters will be merged. The adapters are left out, and likewise
            in the place of a linear layer's weight is an empty tensor.

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
        if merged and _is_adapter(model, name):
            continue
        if name not in shapes or tensor.shape != shapes[name]:
            problems.append(
                f"{name}: {type(model).__name__} has no such tensor of shape {tuple(tensor.shape)}; unload "
                f"adapters of PEFT, merge those that quantize_ made with merge_adapters=True or save them "
                f"alone with save_adapter, convert what quantization-aware training prepared"
            )
        elif name in weights:
            problems += _packed_problems(name, tensor)
            state[name] = tensor
        elif name in merged and name in tied:
            problems.append(
                f"{name}: has adapters, and model.config ties it to another tensor; set "
                f"tie_word_embeddings=False there"
            )
        elif name in merged or (isinstance(tensor, MXTensor) and name not in tied):
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        elif name not in tied:
            state[name] = tensor
    problems += [f"{name}: missing from the model" for name in shapes.keys() - tensors.keys()]
    if problems:
        raise_problems(problems, f"{type(model).__name__} cannot be saved in gpt-oss's layout")
    return state


def adapters_in(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Our adapters, by their names in the model."""
    return {name: t for name, t in model.state_dict().items() if _is_adapter(model, name)}


def stored(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a checkpoint has for a parameter: blocks and scales of a packed one, ``[E, in, out]``."""
    if not isinstance(tensor, MXTensor):
        return {name: tensor}
    blocks, scales = tensor.mT.to_blocks()
    return {name + BLOCKS: blocks, name + SCALES: scales}


def _is_adapter(model: PreTrainedModel, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    ours = isinstance(owner, (MXLoRALinear, MXLoRAExperts))
    return ours and name.endswith(("lora_A", "lora_B"))


def _packed_problems(name: str, weight: torch.Tensor) -> list[str]:
    """What is wrong with ``weight [E, in, out]``."""
    if not isinstance(weight, MXTensor) or weight.format != MXFP4 or weight.packed_axis != -2:
        what = weight if isinstance(weight, MXTensor) else f"a plain {weight.dtype} tensor"
        problem = (
            f"{name}: {what}; this layout holds it in {MXFP4.name}, in blocks along the input axis: "
            f"quantize experts with MXWeightOnlyConfig()"
        )
        return [problem]
    blocks, scales = stored(name, weight).values()
    return value_problems(name, lambda: blocks, scales)
