"""FSDP2 for quantization-aware training: weights gathered as the packed bytes that the forward pass uses."""

from __future__ import annotations

import warnings

from torch import nn
from torch.distributed.tensor import DTensor

from torchao_mx.qat import MXFakeQuantizedExperts, MXFakeQuantizedLinear
from torchao_mx.tensor.master_tensor import MasterTensor


def gather_packed(model: nn.Module) -> nn.Module:
    """Have ``fully_shard`` gather the weights of fake-quantized layers packed rather than in their dtype.

    Call it after ``QATConfig(..., step="prepare")`` and before ``fully_shard``. Outputs and gradients are,
    bit for bit, what they are without it; with ``MixedPrecisionPolicy(param_dtype=...)`` weights are
    quantized from their own dtype, as conversion will quantize them, where without it they would be rounded
    to ``param_dtype`` first. Masters, their gradients and optimizer states stay in high precision, sharded.
    Checkpoints of the sharded model are those of plain parameters.

    Before ``step="convert"``, load a checkpoint into a model that is not sharded.

    Args:
        model: changed in place: the weights of its :class:`MXFakeQuantizedLinear` and
            :class:`MXFakeQuantizedExperts` become :class:`MasterTensor` parameters.

    Returns:
        ``model``.

    Raises:
        ValueError: a weight is a DTensor: the model is sharded already.

    Example::

        quantize_(model, QATConfig(MXWeightOnlyConfig(), step="prepare"))
        gather_packed(model)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    """
    masters: dict[int, nn.Parameter] = {}  # tied weights stay tied
    found = False
    for name, module in model.named_modules():
        if not isinstance(module, (MXFakeQuantizedLinear, MXFakeQuantizedExperts)):
            continue
        found = True
        is_experts = isinstance(module, MXFakeQuantizedExperts)
        spec = module.weight_config.spec
        for key in module.layout.weights if is_experts else ("weight",):
            weight = module._parameters[key]
            if isinstance(weight, DTensor):
                raise ValueError(
                    f"{name}.{key} is a DTensor, sharded already; call gather_packed before fully_shard"
                )
            if isinstance(weight, MasterTensor):
                continue
            if id(weight) not in masters:
                data = MasterTensor(weight.detach(), spec, is_experts and module.layout.transposed)
                masters[id(weight)] = nn.Parameter(data, weight.requires_grad)
            module._parameters[key] = masters[id(weight)]
    if not found:
        warnings.warn("gather_packed found no fake-quantized layer; nothing changed", stacklevel=2)
    return model
