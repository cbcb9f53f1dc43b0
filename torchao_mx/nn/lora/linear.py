"""MXLoRALinear: a linear layer with a frozen, packed weight and trained adapters.

With the frozen ``W [N, K]``, ``A [r, K]`` and ``B [N, r]`` (``lora_A`` and ``lora_B``)::

    y = x W^T + s (x A^T) B^T + bias

One op computes this, ``packed_mm/lora.py``. ``W + s B A`` is never formed. Backward decodes the packed bytes
again, so no unpacked ``W`` is kept. Dropout on the adapters' input gives the two terms different x, so in
training they are two products.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchao_mx import ops
from torchao_mx.nn.experts.module import local_of
from torchao_mx.nn.linear_checks import check_linear, is_linear
from torchao_mx.nn.lora.config import MXWeightOnlyLoRAConfig
from torchao_mx.nn.modules import check_not_in_training, twin_of
from torchao_mx.ops.packed_mm.strategy import compute_names
from torchao_mx.tensor import LoRATensor, MXTensor
from torchao_mx.tensor.lora_tensor import check_base
from torchao_mx.tensor.matmul import check_frozen
from torchao_mx.torch_internals import parameters_of


class MXLoRALinear(nn.Linear):
    """An ``nn.Linear`` on a frozen packed weight, with LoRA adapters.

    ``weight`` (an :class:`MXTensor`) and ``bias`` are frozen. ``lora_A [r, in_features]`` and
    ``lora_B [out_features, r]`` are trained: plain parameters, initialized as in PEFT (Kaiming-uniform and
    zero), so the layer first computes what the quantized one does. They keep their own dtype, whatever the
    activations' dtype. ``state_dict`` has these four names.

    ``quantize_`` with an :class:`MXWeightOnlyLoRAConfig` makes it from a model's layers, and
    :meth:`from_linear` from one layer. The constructor quantizes a random weight, for loading a state.

    Args:
        in_features: K, a multiple of the block size.
        out_features: N.
        bias: whether to add a bias.
        config: rank, format and so on; None for the default.
        device: device of the parameters.
        dtype: dtype of the bias, and logical dtype of the weight.

    Raises:
        TypeError: the dtype is unsupported, or ``config`` has another type.
        ValueError: ``in_features`` is not a multiple of the block size, or the rank exceeds a side.

    Example:
        >>> import torch
        >>> from torchao_mx import MXLoRALinear, MXWeightOnlyLoRAConfig
        >>> linear = MXLoRALinear(64, 32, config=MXWeightOnlyLoRAConfig(r=4, lora_alpha=8))
        >>> linear(torch.randn(2, 5, 64)).sum().backward()
        >>> linear.lora_B.grad.shape, linear.weight.grad
        (torch.Size([32, 4]), None)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: MXWeightOnlyLoRAConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = MXWeightOnlyLoRAConfig() if config is None else config
        linear = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
        check_lora_linear(linear, config)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapters(config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: MXWeightOnlyLoRAConfig) -> MXLoRALinear:
        """Make the twin of ``linear`` with adapters; the weight is quantized unless it is an MXTensor.

        The twin keeps hooks and training mode and shares the bias; ``linear`` is unchanged.

        Raises:
            TypeError, ValueError: as in the constructor; also if ``linear`` is not a plain ``nn.Linear``, or
                its MXTensor quantizes activations.
        """
        check_lora_linear(linear, config)
        twin = twin_of(cls, linear)
        twin.__dict__.pop("extra_repr", None)  # set by quantize_ for a packed weight
        twin._add_adapters(config)
        return twin

    def _add_adapters(self, config: MXWeightOnlyLoRAConfig) -> None:
        """Pack and freeze the parameters as new ones, because a twin shares them with its source."""
        weight, spec = self.weight.detach(), config.weight_spec
        if not isinstance(weight, MXTensor):
            weight = MXTensor.from_hp(weight, spec.format, spec.scaling_mode)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach(), requires_grad=False)
        self.config = config
        options = {"device": weight.device, "dtype": config.adapter_dtype or weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(config.r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.r, **options))
        # The packed weight while a merged one replaces it; moves with the module, not in state_dict.
        self.register_buffer("packed_weight", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the adapters; the frozen weight and bias stay as they are."""
        if "lora_A" not in parameters_of(self):  # called by nn.Linear's constructor
            super().reset_parameters()
            return
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def merged(self) -> bool:
        return self.packed_weight is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        config, w = self.config, self.weight
        check_frozen(w, type(self).__name__)
        options = {
            "per_tensor_scale": w.per_tensor_scale,
            "bias": self.bias,
            "strategy": config.strategy,
            "max_scratch_bytes": config.max_scratch_bytes,
        }
        if self.training and config.lora_dropout:
            y = ops.matmul(x, w.qdata, w.scale, w.format, **options)
            h = F.linear(F.dropout(x, config.lora_dropout), self.lora_A.to(x.dtype))
            return torch.add(y, F.linear(h, self.lora_B.to(x.dtype)), alpha=config.scaling)
        return ops.lora_matmul(
            x,
            w.qdata,
            w.scale,
            w.format,
            self.lora_A,
            self.lora_B,
            config.scaling,
            compute_dtype=config.compute_dtype,
            grad_compute_dtype=config.grad_compute_dtype,
            **options,
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the weight with ``weight + s B A`` in its logical dtype; the adapters are then unused.

        The sum is in fp32, rounded once. The packed weight is kept for :meth:`unmerge`, so memory grows;
        ``state_dict`` holds the merged weight.
        """
        if self.merged:
            warnings.warn(f"{self} is already merged and is left as it is", stacklevel=2)
            return
        packed = self.weight.detach()
        merged = LoRATensor(packed, self.lora_A, self.lora_B, self.config.scaling).dequantize()
        self.packed_weight = packed
        self.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Restore the packed weight, bit for bit."""
        if not self.merged:
            warnings.warn(f"{self} is not merged and is left as it is", stacklevel=2)
            return
        self.weight = nn.Parameter(self.packed_weight, requires_grad=False)
        self.packed_weight = None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Raise for a weight of the other kind, which ``assign=True`` would install."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and isinstance(local_of(weight), MXTensor) == self.merged:
            todo = (
                "call unmerge() on this layer first"
                if self.merged
                else "load high-precision weights before quantize_, and save this layer unmerged"
            )
            raise TypeError(
                f"{prefix}weight in the state is {weight if self.merged else 'not an MXTensor'}, but the "
                f"layer is {self}: {todo}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        weight = local_of(self.packed_weight if self.merged else self.weight)
        text = f"{super().extra_repr()}, {self.config.repr_of(weight._quantization_type())}"
        return f"{text}, merged" if self.merged else text


def check_lora_linear(module: nn.Module, config: MXWeightOnlyLoRAConfig) -> None:
    """Raise unless ``module`` can become an :class:`MXLoRALinear`; change nothing."""
    if not isinstance(config, MXWeightOnlyLoRAConfig):
        raise TypeError(f"config={config!r} must be a torchao_mx.MXWeightOnlyLoRAConfig")
    if isinstance(module, MXLoRALinear):
        raise TypeError(f"{module} already has adapters: train these, or leave this layer out")
    check_not_in_training(module)
    if isinstance(module, nn.Linear) and isinstance(parameters_of(module).get("weight"), MXTensor):
        _check_packed_weight(module, config)
    else:
        check_linear(module, config.weight_spec, None)
    name = f"{type(module).__name__}(in_features={module.in_features}, out_features={module.out_features})"
    own_forward = type(module).forward is not nn.Linear.forward or "forward" in vars(module)
    if own_forward or not is_linear(module):
        raise TypeError(
            f"{name}: it has its own forward, or another module reads its weight, so adapters would be "
            f"bypassed; leave this layer out with filter_fn"
        )
    if config.r > min(module.in_features, module.out_features):
        raise ValueError(
            f"{name}: r={config.r} exceeds its smaller side; use a smaller r, or leave this layer out "
            f"with filter_fn"
        )


def _check_packed_weight(module: nn.Linear, config: MXWeightOnlyLoRAConfig) -> None:
    name = f"{type(module).__name__}(in_features={module.in_features}, out_features={module.out_features})"
    try:
        check_base(module.weight)
        compute_names(
            config.compute_dtype, config.grad_compute_dtype, module.weight.format, grouped=False
        )
    except ValueError as error:
        raise ValueError(f"{name}: its weight: {error}") from None
