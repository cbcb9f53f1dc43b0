"""FSDP2 for quantization-aware training: gather weights as the packed bytes that forward uses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from torchao_mx.nn.qat import MXFakeQuantizedExperts, MXFakeQuantizedLinear
from torchao_mx.nn.recipes import NVFP4MXFP8Experts, NVFP4MXFP8Linear
from torchao_mx.tensor.master_tensor import MasterTensor
from torchao_mx.torch_internals import parameters_of


def gather_packed(model: nn.Module) -> nn.Module:
    """Make ``fully_shard`` gather the weights of fake-quantized layers packed instead of in their dtype.

    Call it after ``QATConfig(..., step="prepare")`` and before ``fully_shard``. Outputs and gradients stay
    the same, bit for bit. Only ``MixedPrecisionPolicy(param_dtype=...)`` makes a difference: weights are then
    quantized from their own dtype, as in conversion, rather than rounded to ``param_dtype`` first. Masters,
    their gradients and optimizer states stay in high precision and sharded. Checkpoints of the sharded model
    equal those of plain parameters.

    Before ``step="convert"``, load a checkpoint into a model that is not sharded.

    Args:
        model: changed in place: the weights of its :class:`MXFakeQuantizedLinear` and
            :class:`MXFakeQuantizedExperts` become :class:`MasterTensor` parameters.

    Returns:
        ``model``.

    Raises:
        TypeError: a layer uses :class:`NVFP4ForwardMXFP8BackwardConfig`, which quantizes its weight
            differently in backward.
        ValueError: a weight is a DTensor: the model is sharded already.

    Example::

        quantize_(model, QATConfig(MXWeightOnlyConfig(), step="prepare"))
        gather_packed(model)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (MXFakeQuantizedLinear, MXFakeQuantizedExperts))
    }
    for name, module in layers.items():
        _check(name, module)
    masters: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in layers.values():
        transposed = isinstance(module, MXFakeQuantizedExperts) and module.layout.transposed
        for key in _weights(module):
            weight = parameters_of(module)[key]
            if isinstance(weight, MasterTensor):
                continue
            if id(weight) not in masters:
                data = MasterTensor(weight.detach(), module.weight_config.spec, transposed)
                masters[id(weight)] = nn.Parameter(data, weight.requires_grad)
            module.register_parameter(key, masters[id(weight)])
    if not layers:
        warnings.warn("gather_packed found no fake-quantized layer; nothing changed", stacklevel=2)
    return model


def _weights(module: nn.Module) -> Sequence[str]:
    return module.layout.weights if isinstance(module, MXFakeQuantizedExperts) else ("weight",)


def _check(name: str, module: nn.Module) -> None:
    if isinstance(module, (NVFP4MXFP8Linear, NVFP4MXFP8Experts)):
        raise TypeError(
            f"{name}: {type(module).__name__} quantizes its weight differently in backward and needs it "
            f"unpacked: leave gather_packed out, and fully_shard gathers that weight in its own dtype"
        )
    for key in _weights(module):
        if isinstance(parameters_of(module)[key], DTensor):
            raise ValueError(
                f"{name}.{key} is a DTensor, sharded already; call gather_packed before fully_shard"
            )
