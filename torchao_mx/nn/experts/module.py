"""MXExperts, the replacement for a module of experts, and functions that pack, check and report such modules.

``layouts.py`` lists the known classes. Parameters may be DTensors that hold some of the experts on each rank;
products see the local part.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torchao.utils import TorchAOBaseTensor

from torchao_mx.errors import check_blocks, check_high_precision
from torchao_mx.formats import NVFP4, QuantizeSpec
from torchao_mx.nn.experts import pipeline
from torchao_mx.nn.experts.layouts import Layout, _layout_of, layout_of
from torchao_mx.nn.modules import twin_of
from torchao_mx.tensor import MXTensor
from torchao_mx.torch_internals import parameters_of


class LocalExperts(Protocol):
    """The function that a rank computes with its own E' experts."""

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``(x [R, H], ids [R, k] below E', weights [R, k]) -> [R, H]``."""


class Exchange(Protocol):
    """How a module whose experts are split over ranks reaches the experts on other ranks.

    :class:`torchao_mx.distributed.ExpertParallel` sets it on a module.
    """

    def routed(
        self, experts: LocalExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """``(hidden [T, H], ids [T, k] of all E experts, weights [T, k]) -> [T, H]``."""

    def grouped(
        self, experts: LocalExperts, rows: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """``(rows [R, H] in the order of all E experts, counts [E]) -> [R, H]``, in that order."""


class MXExperts(nn.Module):
    """A module of experts on frozen packed weights, computed by ``pipeline.py``.

    It has the call signature, attributes, hooks and parameter names of its source module; weights are
    :class:`MXTensor` of the source's logical shape. Made by ``quantize_`` with a PTQ config and
    ``filter_fn=is_experts``, or by converting an :class:`torchao_mx.MXFakeQuantizedExperts`.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import MXWeightOnlyConfig, is_experts
        >>> class GroupedExperts(torch.nn.Module):  # as torchtitan has it
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w1 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...         self.w2 = torch.nn.Parameter(torch.randn(4, 32, 64))
        ...         self.w3 = torch.nn.Parameter(torch.randn(4, 64, 32))
        ...
        ...     def forward(self, x, num_tokens_per_expert): ...
        >>> model = torch.nn.ModuleDict({"experts": GroupedExperts()})
        >>> quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
        >>> model["experts"](torch.randn(5, 32), torch.tensor([2, 0, 1, 2])).shape
        torch.Size([5, 32])
    """

    layout: Layout
    source_class: type[nn.Module]
    exchange: Exchange | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the products."""
        return {}

    @classmethod
    def stand_in(cls, module: nn.Module) -> Any:
        """Make a ``cls`` that shares all state of a module of experts and leaves it unchanged."""
        twin = twin_of(cls, module)
        twin.layout = layout_of(module)
        twin.source_class = module.source_class if isinstance(module, MXExperts) else type(module)
        return twin

    @property
    def n_experts(self) -> int:
        """E, or the number of experts on this rank if they are split over ranks."""
        return self.local_parameter(self.layout.weights[0]).shape[0]

    def local_parameter(self, name: str) -> torch.Tensor:
        """Return the parameter ``name``, or a DTensor's part on this rank, through which gradients flow."""
        return local_of(parameters_of(self)[name])

    def operand(self, name: str) -> pipeline.Weight:
        """Return the products' operand for the weight ``name``, in the source's storage order."""
        return self.local_parameter(name)

    def base(self, name: str) -> torch.Tensor:
        """Return the weight ``name`` as ``[E, out, in]``, E as in :attr:`n_experts`."""
        weight = self.local_parameter(name)
        return weight.mT if self.layout.transposed else weight

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the source's forward; the layout defines the arguments."""
        return self.layout.forward(self, *args, **kwargs)

    def shapes_repr(self) -> str:
        """Return the source's name and the shapes of its weights."""
        shapes = [f"{n}={tuple(parameters_of(self)[n].shape)}" for n in self.layout.weights]
        if self.exchange is not None:
            shapes.append(str(self.exchange))
        return f"{self.source_class.__name__}: {', '.join(shapes)}"

    def extra_repr(self) -> str:
        weight = self.base(self.layout.weights[0])
        return f"{self.shapes_repr()}, weight={weight._quantization_type()}"


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, differentiably; return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Wrap ``local`` as this rank's part of a DTensor split like ``tensor``, if ``tensor`` is one."""
    if not isinstance(tensor, DTensor):
        return local
    check_placements(tensor, "the weight")
    return split_experts(local, tensor.device_mesh, tensor.placements, tensor.shape[0])


def split_experts(
    local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], n_experts: int
) -> DTensor:
    """Make the DTensor ``[n_experts, ...]`` of which the dense ``local`` is this rank's part."""
    shape = torch.Size((n_experts, *local.shape[1:]))
    # FSDP2 needs contiguous parameters; packed weights with dense blocks count as such, even transposed.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def check_placements(tensor: torch.Tensor, what: str) -> None:
    """Raise unless a DTensor is split only by whole experts, along its first axis.

    Raises:
        TypeError: ``tensor`` is split otherwise; its local blocks and shape then say nothing about the whole.
    """
    if not isinstance(tensor, DTensor):
        return
    if not all(p.is_replicate() or p.is_shard(0) for p in tensor.placements):
        raise TypeError(
            f"{what} is a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements}; "
            f"experts may only be split along axis 0, by whole experts: call quantize_ before splitting, "
            f"gather with full_tensor(), or redistribute to Shard(0)"
        )


def pack(
    weight: torch.Tensor,
    transposed: bool,
    spec: QuantizeSpec,
    activation: QuantizeSpec | None = None,
) -> torch.Tensor:
    """Pack ``[E, out, in]`` (``[E, in, out]`` if transposed) in blocks along ``in``; keep the shape.

    A DTensor split along E remains one.
    """
    if isinstance(weight, DTensor):
        return placed_like(pack(weight.to_local(), transposed, spec, activation), weight)
    stored = weight.mT.contiguous() if transposed else weight
    packed = MXTensor.from_hp(stored, spec.format, spec.scaling_mode, activation=activation)
    return packed.mT if transposed else packed


def pack_singly(
    weight: torch.Tensor,
    transposed: bool,
    spec: QuantizeSpec,
    activation: QuantizeSpec | None = None,
) -> torch.Tensor:
    """:func:`pack`, an expert at a time: on the CPU, quantizing takes 8 times the memory of its input."""
    parts = [pack(part, transposed, spec, activation) for part in weight.split(1)]
    return torch.cat([part.mT for part in parts]).mT if transposed else torch.cat(parts)


def quantize_experts(
    module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None
) -> MXExperts:
    """Return the frozen packed twin of a module of experts; warn if the module is packed already."""
    layout = layout_of(module)
    if is_packed(module):
        warnings.warn(
            f"{type(module).__name__} already holds MXTensors and is left as it is. Quantize a model once, "
            f"or exclude this module with filter_fn",
            stacklevel=2,
        )
        return module if isinstance(module, MXExperts) else MXExperts.stand_in(module)
    check_experts(module, weight, activation)
    twin = MXExperts.stand_in(module)
    for name in layout.weights:
        packed = pack(parameters_of(module)[name].detach(), layout.transposed, weight, activation)
        twin.register_parameter(name, nn.Parameter(packed, requires_grad=False))
    return twin


def check_experts(module: nn.Module, weight: QuantizeSpec, activation: QuantizeSpec | None) -> None:
    """Raise unless the weights of a module of experts can be quantized to these specs; change nothing."""
    check_parameters(module)
    layout, kind = layout_of(module), type(module).__name__
    for name in layout.weights:
        data, what = local_of(parameters_of(module)[name]).detach(), f"{kind}.{name}"
        if isinstance(data, MXTensor):
            raise TypeError(
                f"{what} is already an MXTensor; quantize from high-precision weights, or leave this module "
                f"out with filter_fn"
            )
        check_high_precision(data.dtype, what)
        stored = data.mT if layout.transposed else data
        check_blocks(stored.shape, weight.format, -1, what)
        if activation is not None:
            check_blocks(stored.shape, activation.format, -1, f"{what}: its input")


def check_parameters(module: nn.Module) -> None:
    """Raise unless ``module`` is of a known class, has the biases its flags promise and splits no expert."""
    layout, kind = layout_of(module), type(module).__name__
    if layout is None:
        raise TypeError(
            f"{kind} is not a known module of experts; select those with "
            f"quantize_(..., filter_fn=torchao_mx.is_experts)"
        )
    missing = [n for n in layout.biases if parameters_of(module).get(n) is None]
    if missing:
        raise ValueError(f"{kind} has no {' and no '.join(missing)}, which its flags promise")
    for name in (*layout.weights, *layout.biases):
        check_placements(parameters_of(module)[name], f"{kind}.{name}")


def is_packed(module: nn.Module) -> bool:
    """Return whether all weights of a module of experts are MXTensors."""
    weights = (parameters_of(module)[name] for name in layout_of(module).weights)
    return all(isinstance(local_of(weight), MXTensor) for weight in weights)


def is_experts(module: nn.Module, fqn: str = "") -> bool:
    """Select known modules of experts with 3-D weights, as a ``filter_fn`` for ``quantize_``.

    Known are transformers v5's classes under ``use_experts_implementation`` (gpt-oss, Qwen3-MoE, Mixtral,
    DeepSeek-V3, Nemotron-H, GLM4-MoE and others), Llama 4's and JetMoE's; transformers 4.57's gpt-oss, Llama
    4, Granite, JetMoE and Aria; torchtitan's ``GroupedExperts`` and ``GptOssGroupedExperts``; and classes
    passed to :func:`torchao_mx.register_experts`. Other modules with 3-D weights cause a warning, once per
    class; :func:`unclaimed_experts` names all of them.

    Example:
        >>> import torch
        >>> from torchao_mx import is_experts
        >>> is_experts(torch.nn.Linear(32, 32))
        False
    """
    if layout_of(module) is not None:
        return True
    reason = _unclaimed(module)
    if reason is not None and type(module) not in _WARNED:
        _WARNED.add(type(module))
        warnings.warn(f"{fqn or 'a module'}: {reason}", stacklevel=2)
    return False


_WARNED: WeakSet[type[nn.Module]] = WeakSet()


def unclaimed_experts(model: nn.Module) -> dict[str, str]:
    """Return the modules of ``model`` that may be experts but stay in high precision for want of a layout.

    These are modules that directly own floating 3-D parameters large enough to pack, and modules that own
    weights and have "expert" in their class name. Layers of ``torch.nn`` and embeddings do not count.

    Returns:
        ``{fully qualified name: reason}``; the reason says what the module holds and what to do.

    Example:
        >>> import torch
        >>> from torchao_mx.nn.experts import unclaimed_experts
        >>> class GeluExperts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w1 = torch.nn.Parameter(torch.randn(4, 64, 32))
        >>> unclaimed_experts(torch.nn.ModuleDict({"experts": GeluExperts()}))  # doctest: +ELLIPSIS
        {'experts': 'GeluExperts holds w1 [4, 64, 32] and is not of a known class of experts; ...'}
    """
    reasons = ((name, _unclaimed(module)) for name, module in model.named_modules())
    return {name: reason for name, reason in reasons if reason is not None}


_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def _unclaimed(module: nn.Module) -> str | None:
    """Return why a possible module of experts is not claimed, or None for any other module."""
    cls = type(module)
    if cls.__module__.startswith("torch.nn.") or layout_of(module) is not None:
        return None
    # isinstance also catches layers of torch.nn that FSDP2 or a parametrization gave a new class
    if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS, nn.Bilinear)):
        return None
    by_name = "expert" in cls.__name__.lower()
    held = {
        name: p
        for name, p in parameters_of(module).items()
        if _may_be_experts(name, p, 2 if by_name else 3)
    }
    if not held:
        return None
    shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in held.items())
    try:
        _layout_of(module)
        why = "is not of a known class of experts"
    except ValueError as error:
        why = f"cannot be used as experts: {error}"
    return (
        f"{cls.__name__} holds {shapes} and {why}; it stays in high precision. If it computes what a known "
        f"class does, call torchao_mx.register_experts({cls.__name__}, layout)"
    )


def _may_be_experts(name: str, p: torch.Tensor | None, dims: int) -> bool:
    """Return whether a parameter may be a stack of high-precision weights; embedding tables are not."""
    if p is None or p.dim() < dims or not p.is_floating_point() or 1 in p.shape or "embed" in name:
        return False
    _, *rows, columns = p.shape if p.dim() > 2 else (1, *p.shape)
    smallest = NVFP4.block_size
    is_packed = isinstance(local_of(p), TorchAOBaseTensor)
    return math.prod(rows) >= smallest and columns >= smallest and not is_packed
