"""How classes of experts hold their 3-D weights and are called: one row a family, found by what a module has.

No model library is imported: a module is known by its parameters and flags. ::

    transformers v5   gate_up_proj, down_proj; is_transposed, has_bias; _apply_gate    (hidden, ids, weights)
    transformers v4   gpt-oss alone: the same parameters, transposed          (hidden, ids, scores [T, E])
    torchtitan        w1, w2, w3 [E, out, in]          (rows in the order of the experts, rows an expert)

A layout's ``forward`` runs the pipeline of ``moe.py`` for an :class:`MXExperts`, the module of ours that
stands in for the source, with its attributes. Parameters may be DTensors that hold a part of the experts on
each rank; the products see the local part.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from torchao_mx import moe, ops
from torchao_mx.checks import check_blocks, check_high_precision
from torchao_mx.formats import QuantizeSpec
from torchao_mx.modules import twin_of
from torchao_mx.tensor import MXTensor


class LocalExperts(Protocol):
    """What a rank computes with its own E' experts."""

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``(x [R, H], ids [R, k] below E', weights [R, k]) -> [R, H]``."""


class Exchange(Protocol):
    """How a module whose experts are split over ranks reaches those of the others.

    :class:`torchao_mx.distributed.ExpertParallel` gives a module one.
    """

    def routed(
        self, experts: LocalExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """``(hidden [T, H], ids [T, k] of all E experts, weights [T, k]) -> [T, H]``."""

    def grouped(
        self, experts: LocalExperts, rows: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """``(rows [R, H] in the order of all E experts, counts [E]) -> [R, H]``, in that order."""


@dataclass(frozen=True)
class Layout:
    """The names of a module's parameters and what they mean.

    Attributes:
        weights: of the 3-D parameters, in the order in which they are used.
        biases: of the ``[E, out]`` parameters, a name for each weight or none at all.
        transposed: whether weights are stored ``[E, in, out]``; otherwise ``[E, out, in]``.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    transposed: bool = False

    def forward(self, module: MXExperts, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The source's forward, on ``module.weight(name)``."""
        raise NotImplementedError

    def routed(
        self,
        module: MXExperts,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate: moe.Activation,
    ) -> torch.Tensor:
        """``moe.experts`` of two weights."""

        def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            up, down = (module.weight(name) for name in self.weights)
            biases = [local_of(getattr(module, name)) for name in self.biases]
            up_bias, down_bias = biases or (None, None)
            return moe.experts(
                x, ids, weights, up, down, gate, n_experts=module.n_experts,
                transpose_weight=not self.transposed, gate_up_bias=up_bias, down_bias=down_bias,
                **module.options,
            )  # fmt: skip

        if module.exchange is None:
            return experts(hidden, ids, weights)
        return module.exchange.routed(experts, hidden, ids, weights)


@dataclass(frozen=True)
class TransformersLayout(Layout):
    """Routed by the caller: ``(hidden [T, H], top_k_index [T, k], top_k_weights [T, k])``."""

    def forward(
        self,
        module: MXExperts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        gate = gate_of(module, module.source_class)
        return self.routed(module, hidden_states, top_k_index, top_k_weights, gate)


@dataclass(frozen=True)
class GptOssV4Layout(Layout):
    """transformers 4.57's gpt-oss: ``(hidden [B, S, H], router_indices [T, k], routing_weights [T, E])``."""

    def forward(
        self,
        module: MXExperts,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = routing_weights.gather(1, router_indices)
        out = self.routed(module, hidden, router_indices, weights, gpt_oss_gate(module))
        return out.view_as(hidden_states)


@dataclass(frozen=True)
class TitanLayout(Layout):
    """torchtitan's ``(x [R, H], num_tokens_per_expert [E])``: rows in the experts' order, in and out."""

    def forward(
        self, module: MXExperts, x: torch.Tensor, num_tokens_per_expert: torch.Tensor
    ) -> torch.Tensor:
        if module.exchange is None:
            offs = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
            return self._products(module, x, offs, None)

        def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            order, offs = ops.route(ids, module.n_experts)
            y = self._products(module, x, offs, order)
            return ops.combine(y, weights, order, offs=offs)

        return module.exchange.grouped(experts, x, num_tokens_per_expert)

    def _products(
        self, module: MXExperts, x: torch.Tensor, offs: torch.Tensor, order: torch.Tensor | None
    ) -> torch.Tensor:
        gate, up, down = (module.weight(name) for name in self.weights)
        options = {"transpose_weight": True} | module.options
        gate = F.silu(moe.grouped_linear(x, gate, offs, order=order, **options))
        rows = gate * moe.grouped_linear(x, up, offs, order=order, **options)
        return moe.grouped_linear(rows, down, offs, **options)


def gate_of(module: Any, cls: type) -> moe.Activation:
    """The ``_apply_gate`` of ``cls``, with module's attributes; as one op where that knows it."""
    gate = _gate_name(cls)
    if gate == "GptOssExperts._apply_gate":
        return gpt_oss_gate(module)
    is_silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    if gate == "_default_apply_gate" and is_silu:
        return lambda gate_up, offs: ops.swiglu(gate_up)
    return lambda gate_up, offs: cls._apply_gate(module, gate_up)


@torch.compiler.assume_constant_result
def _gate_name(cls: type) -> str:
    """Not traced: to torch.compile (2.13) a ``__qualname__`` equals no string, and gates would be unknown."""
    return getattr(cls._apply_gate, "__qualname__", "")


def gpt_oss_gate(module: Any) -> moe.Activation:
    """The gate of gpt-oss, with module's ``alpha`` and ``limit``."""
    options = {"interleaved": True, "up_offset": 1.0, "alpha": module.alpha, "limit": module.limit}
    return lambda gate_up, offs: ops.swiglu(gate_up, **options)


class MXExperts(nn.Module):
    """A module of experts on frozen packed weights, computed by the pipeline of ``moe.py``.

    It is called as its source is, and has the source's attributes, hooks and parameters under their names,
    the weights as :class:`MXTensor` of the source's logical shape. Made by ``quantize_`` with a PTQ config
    and ``filter_fn=is_experts``, or by converting an :class:`torchao_mx.MXFakeQuantizedExperts`.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import MXWeightOnlyConfig, is_experts
        >>> experts = torch.nn.Module()  # as torchtitan has it
        >>> for name, shape in {"w1": (4, 64, 32), "w2": (4, 32, 64), "w3": (4, 64, 32)}.items():
        ...     setattr(experts, name, torch.nn.Parameter(torch.randn(shape)))
        >>> model = torch.nn.ModuleDict({"experts": experts})
        >>> quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
        >>> model["experts"](torch.randn(5, 32), torch.tensor([2, 0, 1, 2])).shape
        torch.Size([5, 32])
    """

    layout: Layout
    source_class: type[nn.Module]
    exchange: Exchange | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the products are told."""
        return {}

    @classmethod
    def stand_in(cls, module: nn.Module) -> Any:
        """A ``cls`` that shares everything a module of experts holds, itself unchanged."""
        twin = twin_of(cls, module)
        twin.layout = layout_of(module)
        twin.source_class = module.source_class if isinstance(module, MXExperts) else type(module)
        return twin

    @property
    def n_experts(self) -> int:
        """E; of experts that are split over ranks those of this one."""
        return self.local_parameter(self.layout.weights[0]).shape[0]

    def local_parameter(self, name: str) -> torch.Tensor:
        """The parameter ``name``; of a DTensor its part on this rank, through which gradients go."""
        return local_of(self._parameters[name])

    def weight(self, name: str) -> moe.Weight:
        """What the products take for the weight ``name``, stored as the source stores it."""
        return self.local_parameter(name)

    def base(self, name: str) -> torch.Tensor:
        """The weight ``name`` as ``[E, out, in]``, E as in :attr:`n_experts`."""
        weight = self.local_parameter(name)
        return weight.mT if self.layout.transposed else weight

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the source's."""
        return self.layout.forward(self, *args, **kwargs)

    def shapes_repr(self) -> str:
        """The source's name and its weights' shapes."""
        shapes = [f"{n}={tuple(self._parameters[n].shape)}" for n in self.layout.weights]
        if self.exchange is not None:
            shapes.append(str(self.exchange))
        return f"{self.source_class.__name__}: {', '.join(shapes)}"

    def extra_repr(self) -> str:
        weight = self.base(self.layout.weights[0])
        return f"{self.shapes_repr()}, weight={weight._quantization_type()}"


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor, differentiably; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``local`` as this rank's part of a DTensor, split as ``tensor`` is; itself if that is not split."""
    if not isinstance(tensor, DTensor):
        return local
    return split_experts(local, tensor.device_mesh, tensor.placements, tensor.shape[0])


def split_experts(
    local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], n_experts: int
) -> DTensor:
    """The DTensor ``[n_experts, ...]`` of which ``local``, dense, is this rank's part."""
    shape = torch.Size((n_experts, *local.shape[1:]))
    # FSDP2 takes what is contiguous. Packed weights whose blocks lie dense are, transposed or not.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def pack(
    weight: torch.Tensor,
    transposed: bool,
    spec: QuantizeSpec,
    activation: QuantizeSpec | None = None,
) -> torch.Tensor:
    """``[E, out, in]`` (``[E, in, out]`` if transposed) in blocks along ``in``, of the same shape.

    A DTensor that is split along E stays one.
    """
    if isinstance(weight, DTensor):
        return placed_like(pack(weight.to_local(), transposed, spec, activation), weight)
    stored = weight.mT.contiguous() if transposed else weight
    packed = MXTensor.from_hp(stored, spec.format, spec.scaling_mode, activation=activation)
    return packed.mT if transposed else packed


def quantize_experts(
    module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None
) -> MXExperts:
    """The frozen packed twin of a module of experts; twice is once, with a warning."""
    layout = layout_of(module)
    if is_packed(module):
        warnings.warn(
            f"{type(module).__name__} holds MXTensors already; left as it is. Quantize a model once, or "
            f"exclude this module with filter_fn",
            stacklevel=2,
        )
        return module if isinstance(module, MXExperts) else MXExperts.stand_in(module)
    check_experts(module, weight, activation)
    twin = MXExperts.stand_in(module)
    for name in layout.weights:
        packed = pack(module._parameters[name].detach(), layout.transposed, weight, activation)
        twin._parameters[name] = nn.Parameter(packed, requires_grad=False)
    return twin


def check_experts(module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None) -> None:
    """Refuse a module of experts whose weights cannot be quantized so; nothing is changed."""
    layout, kind = layout_of(module), type(module).__name__
    check_biases(module)
    for name in layout.weights:
        data, what = local_of(module._parameters[name]).detach(), f"{kind}.{name}"
        if isinstance(data, MXTensor):
            raise TypeError(
                f"{what} is an MXTensor already; quantize from high-precision weights, or leave this module "
                f"out with filter_fn"
            )
        check_high_precision(data.dtype, what)
        stored = data.mT if layout.transposed else data
        check_blocks(stored.shape, weight.format, -1, what)
        if activation is not None:
            check_blocks(stored.shape, activation.format, -1, f"{what}: its input")


def check_biases(module: nn.Module) -> None:
    """Refuse a module of experts without the biases that its flags promise."""
    missing = [n for n in layout_of(module).biases if module._parameters.get(n) is None]
    if missing:
        raise ValueError(
            f"{type(module).__name__} has no {' and no '.join(missing)}, which its flags promise"
        )


def is_packed(module: nn.Module) -> bool:
    """Whether all weights of a module of experts are MXTensors."""
    weights = (module._parameters[name] for name in layout_of(module).weights)
    return all(isinstance(local_of(weight), MXTensor) for weight in weights)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module of experts; None for any other module."""
    if isinstance(module, MXExperts):
        return module.layout
    weights = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    if weights.keys() == {"w1", "w2", "w3"}:
        return TitanLayout(("w1", "w3", "w2"))
    if weights.keys() != {"gate_up_proj", "down_proj"}:
        return None
    names = ("gate_up_proj", "down_proj")
    if hasattr(module, "_apply_gate"):
        if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
            return None
        biases = (
            tuple(f"{name}_bias" for name in names) if getattr(module, "has_bias", False) else ()
        )
        return TransformersLayout(names, biases, getattr(module, "is_transposed", False))
    if hasattr(module, "limit") and hasattr(module, "alpha"):
        return GptOssV4Layout(names, tuple(f"{name}_bias" for name in names), True)
    return None


def is_experts(module: nn.Module, fqn: str = "") -> bool:
    """A ``filter_fn`` for ``quantize_``: modules of experts with 3-D weights that our configs convert.

    transformers v5's expert classes with a gate (gpt-oss, Qwen3-MoE, Mixtral, DeepSeek-V3, OLMoE, GLM4-MoE
    and their like), transformers 4.57's gpt-oss, and torchtitan's ``GroupedExperts`` of three weights.

    Example:
        >>> import torch
        >>> from torchao_mx import is_experts
        >>> is_experts(torch.nn.Linear(32, 32))
        False
    """
    return layout_of(module) is not None
