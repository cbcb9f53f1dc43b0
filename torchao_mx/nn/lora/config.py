"""The config of LoRA on frozen packed weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torchao.core.config import AOBaseConfig

from torchao_mx.errors import HIGH_PRECISION_DTYPES
from torchao_mx.formats import BlockFormat, QuantizeSpec, ScaleCalculationMode
from torchao_mx.ops.packed_mm.strategy import check_strategy, compute_names


@dataclass(frozen=True)
class MXWeightOnlyLoRAConfig(AOBaseConfig):
    """Freeze layers in a block format and train LoRA adapters beside them: QLoRA in MX formats.

    ``quantize_`` turns each ``nn.Linear`` into an :class:`MXLoRALinear`. It quantizes a high-precision weight
    and keeps a weight that is already an :class:`MXTensor`, in any format. In these layers only the adapters
    then require gradients. Parameters of other modules stay as they are: to train only adapters, call
    ``model.requires_grad_(False)`` first.

    Args:
        r: rank of the adapters, at most each layer's smaller side.
        lora_alpha: the adapters' product is multiplied by ``lora_alpha / r``.
        lora_dropout: probability of dropping an element of the adapters' input in training. Above 0, the
            forward pass in training is not fused.
        use_rslora: multiply by ``lora_alpha / sqrt(r)`` instead.
        dtype: element type of the weights: ``torch.float4_e2m1fn_x2``, ``torch.float8_e4m3fn`` or
            ``torch.float8_e5m2``.
        block_size: 32 for the MX formats; 16 with 4-bit elements for NVFP4.
        scaling_mode: how an E8M0 scale follows from a block's largest magnitude.
        compute_dtype: None multiplies in x's dtype. ``torch.float8_e4m3fn`` rounds x by rows and multiplies
            MXFP4 weights on 8-bit tensor cores; the adapters' product stays in x's dtype.
        grad_compute_dtype: the same choice for the product that gives x's gradient: None or
            ``torch.bfloat16`` for x's dtype or, with a ``compute_dtype``, ``torch.float8_e4m3fn`` or, for
            linear layers only, ``torch.float8_e5m2``.
        strategy: how products are computed on a GPU; see
            :func:`torchao_mx.ops.packed_mm.strategy.choose_strategy`.
        adapter_dtype: bfloat16, float16 or float32; None for the weight's. With bfloat16 activations, float32
            adapters keep updates that bfloat16 would round away.
        max_scratch_bytes: limit on the decoded weight that a product holds at a time; None for 256 MiB or
            the size of the rows of x and of its result, whichever is larger.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a value is out of range, or fields exclude each other.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import MXWeightOnlyLoRAConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32, dtype=torch.bfloat16))
        >>> quantize_(model, MXWeightOnlyLoRAConfig(r=8))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B']
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    dtype: torch.dtype = torch.float4_e2m1fn_x2
    block_size: int = 32
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    compute_dtype: torch.dtype | None = None
    grad_compute_dtype: torch.dtype | None = None
    strategy: str = "auto"
    adapter_dtype: torch.dtype | None = None
    max_scratch_bytes: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_compute()
        if self.adapter_dtype not in (None, *HIGH_PRECISION_DTYPES):
            raise ValueError(
                f"adapter_dtype={self.adapter_dtype}; it must be None (the weight's), torch.bfloat16, "
                f"torch.float16 or torch.float32"
            )

    def _check_numbers(self) -> None:
        for name, kind in (
            ("r", int),
            ("lora_alpha", (int, float)),
            ("lora_dropout", (int, float)),
            ("use_rslora", bool),
            ("max_scratch_bytes", int),
        ):
            value = getattr(self, name)
            if value is None and name == "max_scratch_bytes":
                continue
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                wanted = "a bool" if kind is bool else "an int" if kind is int else "a number"
                raise TypeError(f"{name}={value!r}; it must be {wanted}")
        if self.r < 1:
            raise ValueError(f"r={self.r}; the rank of adapters must be 1 or more")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={self.lora_alpha}; it must be positive and finite")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout={self.lora_dropout}; it must be a probability of at least 0 and below 1"
            )

    def _check_compute(self) -> None:
        compute, _ = compute_names(
            self.compute_dtype, self.grad_compute_dtype, self.weight_spec.format, grouped=False
        )
        check_strategy(self.strategy, self.max_scratch_bytes, compute)
        if compute and self.lora_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout} with compute_dtype={self.compute_dtype}; dropout bypasses "
                f"the fused product, the only one in 8 bits: set one of them to its default"
            )

    @property
    def weight_spec(self) -> QuantizeSpec:
        return QuantizeSpec(BlockFormat.from_dtype(self.dtype, self.block_size), self.scaling_mode)

    @property
    def scaling(self) -> float:
        """The factor of the adapters' product."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def repr_of(self, weight: str) -> str:
        """Describe these adapters on a ``weight`` of this kind, for a module's ``extra_repr``."""
        fields = [
            f"r={self.r}",
            f"alpha={self.lora_alpha}",
            f"scaling={self.scaling:g}",
            f"weight={weight}",
            f"strategy={self.strategy}",
        ]
        if self.lora_dropout:
            fields.append(f"dropout={self.lora_dropout}")
        for name in ("compute_dtype", "grad_compute_dtype"):
            if getattr(self, name) is not None:
                fields.append(f"{name}={getattr(self, name)}")
        return ", ".join(fields)
