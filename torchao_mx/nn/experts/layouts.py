"""The known classes of experts: how each holds its 3-D weights, and how it is called.

A layout claims *classes*: those passed to :func:`register_experts`, and those below, which are matched by
name so that no library need be imported. A class of the same name counts only if its forward takes the same
arguments::

    transformers   v5's classes under use_experts_implementation     (hidden, ids [T, k], weights [T, k])
                   and others with that interface: _apply_gate, is_transposed, has_bias
                   4.57's GptOssExperts                              (hidden, ids, scores [T, E])
                   Llama4TextExperts                                 (hidden [E T, H])
                   JetMoE's and 4.57's Granite's ParallelExperts     (rows in the experts' order, counts)
                   4.57's AriaGroupedExpertsGemm                     (rows in the experts' order, counts [E])
    torchtitan     GroupedExperts, GptOssGroupedExperts              (rows in the experts' order, counts [E])

Subclasses that override forward, or a method that forward calls, compute something else and are not claimed.
A layout's ``forward`` runs ``pipeline.py`` for an :class:`torchao_mx.MXExperts`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from torchao_mx import ops
from torchao_mx.nn.experts import pipeline
from torchao_mx.torch_internals import parameters_of

if TYPE_CHECKING:
    from torchao_mx.nn.experts.module import MXExperts


@dataclass(frozen=True)
class Layout:
    """The names of a module's parameters and their meaning.

    To define a layout, subclass this and implement :meth:`forward`.

    Attributes:
        weights: the names of the 3-D parameters, in the order of their use.
        biases: the names of the ``[E, out]`` parameters, one per weight, or empty.
        transposed: whether weights are stored ``[E, in, out]`` rather than ``[E, out, in]``.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Return the layout of this kind for ``module``.

        Raises:
            ValueError: ``module`` does not compute what this kind does; the message says why.
        """
        raise NotImplementedError

    def forward(self, module: MXExperts, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the source's forward from ``module.operand(name)``."""
        raise NotImplementedError

    def routed(
        self,
        module: MXExperts,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate: pipeline.Activation,
    ) -> torch.Tensor:
        """Run ``pipeline.experts`` with two weights."""

        def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            up, down = (module.operand(name) for name in self.weights)
            biases = [module.local_parameter(name) for name in self.biases]
            up_bias, down_bias = biases or (None, None)
            return pipeline.experts(
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

    @classmethod
    def of(cls, module: nn.Module) -> TransformersLayout:
        if getattr(module, "has_post_expert_norm", False):
            raise ValueError("it normalizes each expert's output, which no layout supports")
        gated = getattr(module, "has_gate", True)
        if not (gated and hasattr(module, "_apply_gate")) and not hasattr(module, "act_fn"):
            raise ValueError("it has neither act_fn nor _apply_gate")
        names = ("gate_up_proj" if gated else "up_proj", "down_proj")
        has_bias = getattr(module, "has_bias", False)
        biases = tuple(f"{name}_bias" for name in names) if has_bias else ()
        return cls(names, biases, getattr(module, "is_transposed", False))

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

    @classmethod
    def of(cls, module: nn.Module) -> GptOssV4Layout:
        if not (hasattr(module, "alpha") and hasattr(module, "limit")):
            raise ValueError("it lacks alpha and limit, which gpt-oss's activation needs")
        names = ("gate_up_proj", "down_proj")
        return cls(names, tuple(f"{name}_bias" for name in names), transposed=True)

    def forward(
        self,
        module: MXExperts,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = routing_weights.gather(1, router_indices)
        gate = gpt_oss_gate(module.alpha, module.limit)
        out = self.routed(module, hidden, router_indices, weights, gate)
        return out.view_as(hidden_states)


@dataclass(frozen=True)
class GroupedLayout(Layout):
    """``(x [R, H], num_tokens_per_expert [E])``: input and output rows in the experts' order."""

    def forward(
        self, module: MXExperts, x: torch.Tensor, num_tokens_per_expert: torch.Tensor
    ) -> torch.Tensor:
        if module.exchange is None:
            offs = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
            return self.products(module, x, offs, None)

        def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            order, offs = ops.route(ids, module.n_experts)
            y = self.products(module, x, offs, order)
            return ops.combine(y, weights, order, offs=offs)

        return module.exchange.grouped(experts, x, num_tokens_per_expert)

    def products(
        self, module: MXExperts, x: torch.Tensor, offs: torch.Tensor, order: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the experts' output for the rows ``x[order // k]``, or ``x`` without an order."""
        raise NotImplementedError

    def linear(
        self,
        module: MXExperts,
        index: int,
        x: torch.Tensor,
        offs: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Multiply ``x`` by the weight at ``index`` and add its bias."""
        bias = module.local_parameter(self.biases[index]) if self.biases else None
        return pipeline.grouped_linear(
            x, module.operand(self.weights[index]), offs, order=order, bias=bias,
            transpose_weight=not self.transposed, **module.options,
        )  # fmt: skip


@dataclass(frozen=True)
class TitanLayout(GroupedLayout):
    """torchtitan's SwiGLU of three weights: ``w1, w2, w3`` until 0.2.2, named by their axes since."""

    @classmethod
    def of(cls, module: nn.Module) -> TitanLayout:
        if "w1_EFD" in parameters_of(module):
            return cls(("w1_EFD", "w3_EFD", "w2_EDF"))
        return cls(("w1", "w3", "w2"))

    def products(
        self, module: MXExperts, x: torch.Tensor, offs: torch.Tensor, order: torch.Tensor | None
    ) -> torch.Tensor:
        gate = F.silu(self.linear(module, 0, x, offs, order))
        return self.linear(module, 2, gate * self.linear(module, 1, x, offs, order), offs)


@dataclass(frozen=True)
class TitanGptOssLayout(GroupedLayout):
    """torchtitan's gpt-oss: interleaved and clamped as in transformers, stored ``[E, out, in]``."""

    @classmethod
    def of(cls, module: nn.Module) -> TitanGptOssLayout:
        if not hasattr(module, "swiglu_limit"):
            raise ValueError("it lacks swiglu_limit, which gpt-oss's activation needs")
        if "mlp1_weight_EGD" in parameters_of(module):
            return cls(("mlp1_weight_EGD", "mlp2_weight_EDF"), ("mlp1_bias_EG", "mlp2_bias_ED"))
        return cls(("mlp1_weight", "mlp2_weight"), ("mlp1_bias", "mlp2_bias"))

    def products(
        self, module: MXExperts, x: torch.Tensor, offs: torch.Tensor, order: torch.Tensor | None
    ) -> torch.Tensor:
        gate = gpt_oss_gate(1.702, module.swiglu_limit)
        return self.linear(module, 1, gate(self.linear(module, 0, x, offs, order), offs), offs)


@dataclass(frozen=True)
class Llama4Layout(GroupedLayout):
    """Llama 4's ``(hidden [E T, H])``: every expert gets all T tokens, scaled by the router."""

    @classmethod
    def of(cls, module: nn.Module) -> Llama4Layout:
        if not hasattr(module, "act_fn"):
            raise ValueError("it has no act_fn")
        return cls(("gate_up_proj", "down_proj"), transposed=True)

    def forward(self, module: MXExperts, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        n_experts = parameters_of(module)[self.weights[0]].shape[0]  # of all ranks
        counts = torch.full((n_experts,), len(rows) // n_experts, device=rows.device)
        return super().forward(module, rows, counts)

    def products(
        self, module: MXExperts, x: torch.Tensor, offs: torch.Tensor, order: torch.Tensor | None
    ) -> torch.Tensor:
        gate_up = self.linear(module, 0, x, offs, order)
        return self.linear(module, 1, default_gate(module)(gate_up, offs), offs)


@dataclass(frozen=True)
class GroupedLinearLayout(GroupedLayout):
    """One weight: ``(inputs [R, in], expert_size)``, a list or tensor of row counts per expert."""

    @classmethod
    def of(cls, module: nn.Module) -> GroupedLinearLayout:
        return cls(("weight",))

    def forward(
        self, module: MXExperts, inputs: torch.Tensor, expert_size: list[int] | torch.Tensor
    ) -> torch.Tensor:
        return super().forward(module, inputs, torch.as_tensor(expert_size, device=inputs.device))

    def products(
        self, module: MXExperts, x: torch.Tensor, offs: torch.Tensor, order: torch.Tensor | None
    ) -> torch.Tensor:
        return self.linear(module, 0, x, offs, order)


@dataclass(frozen=True)
class AriaLayout(GroupedLinearLayout):
    """One weight of transformers 4.57's Aria, stored ``[E, in, out]``."""

    @classmethod
    def of(cls, module: nn.Module) -> AriaLayout:
        return cls(("weight",), transposed=True)

    def forward(
        self, module: MXExperts, input: torch.Tensor, tokens_per_expert: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(module, input, tokens_per_expert)


def gate_of(module: Any, cls: type) -> pipeline.Activation:
    """Return the activation between the two products of ``cls``, as one fused op if possible."""
    if not getattr(module, "has_gate", True):
        return lambda x, offs: module.act_fn(x)
    gate = _gate_name(cls)
    if gate == "GptOssExperts._apply_gate":
        return gpt_oss_gate(module.alpha, module.limit)
    if gate in ("", "_default_apply_gate"):
        return default_gate(module)
    return lambda gate_up, offs: cls._apply_gate(module, gate_up)


def default_gate(module: Any) -> pipeline.Activation:
    """Return ``act_fn(gate) * up`` for gate and up side by side."""
    if type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
        return lambda gate_up, offs: ops.swiglu(gate_up)

    def gate(gate_up: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return gate


@torch.compiler.assume_constant_result
def _gate_name(cls: type) -> str:
    """Return the gate's name, untraced: torch.compile (2.13) finds ``__qualname__`` unequal to any string."""
    return getattr(getattr(cls, "_apply_gate", None), "__qualname__", "")


def gpt_oss_gate(alpha: float, limit: float) -> pipeline.Activation:
    """Return gpt-oss's gate."""
    options = {"interleaved": True, "up_offset": 1.0, "alpha": alpha, "limit": limit}
    return lambda gate_up, offs: ops.swiglu(gate_up, **options)


LAYOUTS: dict[str, type[Layout]] = {
    "transformers": TransformersLayout,
    "transformers_v4_gpt_oss": GptOssV4Layout,
    "llama4": Llama4Layout,
    "grouped_linear": GroupedLinearLayout,
    "transformers_v4_aria": AriaLayout,
    "torchtitan": TitanLayout,
    "torchtitan_gpt_oss": TitanGptOssLayout,
}
_INTERFACE = ("hidden_states", "top_k_index", "top_k_weights")  # transformers v5
_GPT_OSS = ("hidden_states", "router_indices", "routing_weights")
_TITAN = (("x", "num_tokens_per_expert"), ("x_RD", "num_tokens_per_expert_E"))
_PARALLEL = (("inputs", "expert_size"),)
# class name -> (the argument names that its forward may have, layout)
_KNOWN: dict[str, tuple[tuple[tuple[str, ...], ...], type[Layout]]] = {
    "AriaGroupedExpertsGemm": ((("input", "tokens_per_expert"),), AriaLayout),
    "GptOssExperts": ((_GPT_OSS,), GptOssV4Layout),
    "GptOssGroupedExperts": (_TITAN, TitanGptOssLayout),
    "GraniteMoeHybridParallelExperts": (_PARALLEL, GroupedLinearLayout),
    "GraniteMoeParallelExperts": (_PARALLEL, GroupedLinearLayout),
    "GraniteMoeSharedParallelExperts": (_PARALLEL, GroupedLinearLayout),
    "GroupedExperts": (_TITAN, TitanLayout),
    "JetMoeParallelExperts": (_PARALLEL, GroupedLinearLayout),
    "Llama4TextExperts": ((("hidden_states",),), Llama4Layout),
    "Step3p7Experts": ((_INTERFACE,), TransformersLayout),
}
_REGISTERED: WeakKeyDictionary[type[nn.Module], type[Layout] | Layout] = WeakKeyDictionary()


def register_experts(cls: type[nn.Module], layout: str | Layout) -> None:
    """Make a class of experts known to ``is_experts``, and so to all configs and to ``from_pretrained``.

    The class must compute what the layout does, on parameters with the layout's names:

    - "transformers": forward ``(hidden [T, H], ids [T, k], weights [T, k])`` on ``gate_up_proj [E, 2 I, H]``
      and ``down_proj [E, H, I]``, with ``_apply_gate(self, gate_up)`` between them or, without that method,
      ``act_fn(gate) * up`` of the two halves. Optional attributes of the module: ``is_transposed`` for
      weights ``[E, in, out]``, ``has_bias``, and ``has_gate = False`` for ``up_proj [E, I, H]`` followed by
      ``act_fn``.
    - "torchtitan": forward ``(x [R, H], counts [E])``, rows in the order of the experts, ``w2 (silu(w1 x) *
      (w3 x))`` with ``w1 [E, I, H]``, ``w2 [E, H, I]``, ``w3 [E, I, H]``, or ``w1_EFD, w2_EDF, w3_EFD``.
    - "grouped_linear": forward ``(x [R, in], counts [E])``, rows likewise, ``weight [E, out, in]``.
    - "llama4", "torchtitan_gpt_oss", "transformers_v4_gpt_oss", "transformers_v4_aria": like those classes.

    Subclasses count too, unless they override forward or a method that forward calls. Registering a class
    again with the same layout changes nothing.

    Args:
        cls: a subclass of ``nn.Module`` with a forward.
        layout: one of the names, or a :class:`torchao_mx.nn.experts.Layout`.

    Raises:
        TypeError: ``cls`` is not a module class with a forward, or ``layout`` is neither a name nor a layout.
        ValueError: no layout has this name, or ``cls`` is registered with another.

    Example:
        >>> import torch
        >>> from torchao.quantization import quantize_
        >>> from torchao_mx import MXWeightOnlyConfig, is_experts, register_experts
        >>> class MyExperts(torch.nn.Module):
        ...     def __init__(self, experts=4, hidden=32, inner=64):
        ...         super().__init__()
        ...         self.w1 = torch.nn.Parameter(torch.randn(experts, inner, hidden))
        ...         self.w2 = torch.nn.Parameter(torch.randn(experts, hidden, inner))
        ...         self.w3 = torch.nn.Parameter(torch.randn(experts, inner, hidden))
        ...
        ...     def forward(self, rows, counts):
        ...         out, ends = torch.empty_like(rows), counts.cumsum(0).tolist()
        ...         for e, (start, end) in enumerate(zip([0, *ends], ends)):
        ...             x = rows[start:end]
        ...             inner = torch.nn.functional.silu(x @ self.w1[e].T) * (x @ self.w3[e].T)
        ...             out[start:end] = inner @ self.w2[e].T
        ...         return out
        >>> register_experts(MyExperts, "torchtitan")
        >>> model = torch.nn.ModuleDict({"experts": MyExperts()})
        >>> quantize_(model, MXWeightOnlyConfig(), filter_fn=is_experts)
        >>> model["experts"](torch.randn(5, 32), torch.tensor([2, 0, 1, 2])).shape
        torch.Size([5, 32])
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls is {cls!r}; register_experts needs a subclass of nn.Module")
    if cls.forward is nn.Module.forward or cls is nn.Linear:
        raise TypeError(
            f"{cls.__name__} does not define a forward of experts; register the class that does"
        )
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(
                f"layout={layout!r} is unknown; use one of {', '.join(LAYOUTS)}, or pass a Layout object"
            )
        found: type[Layout] | Layout = LAYOUTS[layout]
    elif isinstance(layout, Layout):
        found = layout
    else:
        raise TypeError(
            f"layout={layout!r} must be a name ({', '.join(LAYOUTS)}) or a torchao_mx.nn.experts.Layout"
        )
    before = _REGISTERED.setdefault(cls, found)
    if before != found:
        raise ValueError(
            f"{cls.__name__} is already registered with {before!r}, and a class has only one layout; "
            f"register a subclass, or leave this call out"
        )


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a module of experts, or None for any other module."""
    own = module.__dict__.get("layout")  # set on MXExperts
    if isinstance(own, Layout):
        return own
    if not any(p is not None and p.dim() == 3 for p in parameters_of(module).values()):
        return None
    try:
        return _layout_of(module)
    except ValueError:
        return None


def _layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of a source module; ValueError says why a module of a known class does not fit."""
    cls = type(module)
    for base in cls.__mro__:
        layout = _REGISTERED.get(base) or _known_layout(base, module)
        if layout is None:
            continue
        overridden = _overridden(cls, base)
        if overridden:
            raise ValueError(
                f"it overrides {', '.join(overridden)} of the known class {base.__name__}"
            )
        found = layout if isinstance(layout, Layout) else layout.of(module)
        parameters = ((name, parameters_of(module).get(name)) for name in found.weights)
        missing = [name for name, p in parameters if p is None or p.dim() != 3]
        if missing:
            raise ValueError(
                f"its class {base.__name__} is known, but it lacks 3-D parameters {', '.join(missing)}"
            )
        return found
    return None


def _known_layout(cls: type, module: nn.Module) -> type[Layout] | None:
    """Return the layout of a class that is known without being registered."""
    forward = getattr(cls, "forward", None)
    # transformers' decorator makes forward a function of the file that defines the decorator.
    if getattr(forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe":
        return TransformersLayout
    arguments = _arguments(forward)
    known, layout = _KNOWN.get(cls.__name__, ((), None))
    if arguments in known:
        return layout
    declares = {"forward", "_apply_gate"} <= vars(cls).keys() and all(
        hasattr(module, flag) for flag in ("is_transposed", "has_bias")
    )
    return TransformersLayout if declares and arguments in (_INTERFACE, _GPT_OSS) else None


def _arguments(forward: Any) -> tuple[str, ...] | None:
    """Return the names of a method's arguments."""
    try:
        return tuple(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):
        return None


def _overridden(cls: type, base: type) -> list[str]:
    """List ``base``'s forward and the methods it calls, gates aside, that ``cls`` overrides."""
    code = getattr(inspect.unwrap(base.forward), "__code__", None)
    called = {"forward", *(code.co_names if code else ())} - {"_apply_gate"}
    static = inspect.getattr_static
    return sorted(
        name
        for name in called
        if callable(getattr(base, name, None)) and static(cls, name) is not static(base, name)
    )
