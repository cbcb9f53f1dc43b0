"""Add adapters to the weights that they were trained with: ``Q(W + D)`` with ``D = s B A``.

W is dequantized, summed with D in fp32, one expert at a time, and quantized again in its own format; an
unpacked W is rounded once, to its dtype. The rounding error is returned, since 4 bits are coarse and updates
are small. A warning names the weights that keep less than ``LOST`` of their update.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from torchao_mx.errors import HIGH_PRECISION_DTYPES
from torchao_mx.formats import ScaleCalculationMode, check_scaling_mode
from torchao_mx.hf.adapter import (
    PREFIX,
    Adapter,
    check_config,
    checked_pairs,
    peft_keys,
    read_adapter,
)
from torchao_mx.hf.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from torchao_mx.hf.problems import listed, raise_problems
from torchao_mx.nn.experts.module import layout_of
from torchao_mx.nn.lora import MXLoRAExperts, MXLoRALinear, MXWeightOnlyLoRAConfig
from torchao_mx.tensor import MXTensor
from torchao_mx.torch_internals import parameters_of

# For merged sums. Under RCEIL, a block whose largest element is the format's maximum gets twice the scale,
# and half the resolution, as soon as that element grows; under EVEN the scale stays.
SCALING_MODE = ScaleCalculationMode.EVEN
# A weight that keeps less than this share of its update has lost it.
LOST = 0.1
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+?)((?:\.base_layer)*)\.lora_[AB]\.weight")


class MergeError(NamedTuple):
    """The rounding error of merging an update ``D``: ``Q(W + D) - (W + D)``, in Frobenius norm.

    ``delta_error`` is often 1 or more in 4 bits: a typical update is smaller than half a step of the grid, so
    rounding undoes it; and if a block's scale changes, the whole block is rounded anew. Serving the adapter
    beside the packed weight loses nothing.

    Attributes:
        weight_error: relative to ``|W + D|``.
        delta_error: relative to ``|D|``, so 1 is the cost of leaving the update out; 0 if D is zero.
        kept: the share of D in the change ``C = Q(W + D) - W``, ``<C, D> / max(|C|, |D|)^2``: 1 without
            rounding or if D is zero, 0 if the weight is unchanged or moved by rounding alone. Below 0.1 the
            update counts as lost.
    """

    weight_error: float
    delta_error: float
    kept: float


class MergeWarning(UserWarning):
    """Warns that rounding has undone the update of some weights."""


class Update(NamedTuple):
    """A weight and the update to add to it."""

    weight: torch.Tensor  # W [out, in] or [E, out, in]; if transposed, [E, in, out]
    lora_a: torch.Tensor  # [r, in] or [E, r, in]
    lora_b: torch.Tensor  # [out, r] or [E, out, r]
    scaling: float
    scaling_mode: ScaleCalculationMode | None  # None: a packed weight's sum is stored unpacked
    transposed: bool = False


def merge_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    scaling_mode: ScaleCalculationMode = SCALING_MODE,
) -> dict[str, MergeError]:
    """Add an adapter that :func:`save_adapter` or PEFT saved to the weights of a model without adapters.

    ``W + s B A`` is summed in fp32, one expert at a time. A packed weight is quantized again in its format,
    except for experts whose update is zero, which keep their bytes. An unpacked weight is rounded once, to
    its dtype. Parameters stay the same objects.

    Args:
        model: from :func:`from_pretrained`; ``nn.Linear`` and modules of experts, packed or not.
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Experts' adapters may
            be in PEFT's layout under transformers 5 or 4. If they adapt only some of a module's weights,
            ``target_parameters`` in the config must name them.
        scaling_mode: how a block's E8M0 scale follows from its largest magnitude. Measured for a Gaussian
            weight in MXFP4 (by RCEIL) and an update of 1 % of its norm: ``weight_error`` is 0.010 with EVEN,
            0.045 with FLOOR, 0.049 with RCEIL, 0.107 with CEIL.

    Returns:
        The rounding error of each weight, by full name. **Small updates vanish in 4 bits**: check
        :class:`MergeError` before serving the result. A warning lists the weights that lost their update.

    Raises:
        FileNotFoundError: one of the two files is missing.
        TypeError: ``scaling_mode`` is not a ``ScaleCalculationMode``.
        ValueError: an unsupported kind of adapter; tensors that are missing, unknown, misshapen, not
            floating, or so large that products overflow; weights that cannot be merged into; a model that
            has adapters. The message names each, and no weight is changed.

    Example::

        model = from_pretrained("openai/gpt-oss-20b")
        errors = merge_adapter(model, "adapter")
        min(error.kept for error in errors.values())
        save_pretrained(model, "gpt-oss-20b-merged")
    """
    check_scaling_mode(scaling_mode)
    config, tensors = read_adapter(path)
    check_config(config)
    scaling = _scaling(config)
    _check_bare(model)
    adapters = _adapters_in(tensors, config, model)
    pairs = checked_pairs(adapters, tensors, "weight for it")
    updates = {}
    for adapter, pair in zip(adapters, pairs, strict=True):
        weight = model.get_parameter(adapter.weight).detach()
        update = Update(weight, *pair, scaling, scaling_mode, adapter.transposed)
        updates[adapter.weight] = update
    _check_size(updates)
    errors = {}
    for name in tqdm(list(updates), desc="Merging", disable=None):
        model.get_parameter(name).data, errors[name] = merge(updates.pop(name))
    warn_of_lost(errors)
    return errors


def lost_updates(errors: dict[str, MergeError]) -> str | None:
    """The message about weights that have lost their update; None if there are none."""
    lost = {name: error.kept for name, error in errors.items() if error.kept < LOST}
    if not lost:
        return None
    lines = listed([f"{name}: {100 * kept:.1f} % is kept" for name, kept in lost.items()])
    return (
        f"rounding undoes the update of {len(lost)} of {len(errors)} weights; serve the adapter beside the "
        f"packed weights, which loses nothing:\n{lines}"
    )


def warn_of_lost(errors: dict[str, MergeError]) -> None:
    message = lost_updates(errors)
    if message is not None:
        warnings.warn(message, MergeWarning, stacklevel=3)


def updates_of(model: nn.Module) -> dict[str, Update]:
    """The update of each adapted parameter, by name; linear layers are to be stored unpacked.

    Raises:
        ValueError: adapters so large that their product overflows.
    """
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, MXLoRALinear):
            weight = module.packed_weight if module.merged else module.weight
            adapters = module.lora_A, module.lora_B, module.config.scaling
            updates[f"{name}.weight"] = Update(weight, *adapters, None)
        elif isinstance(module, MXLoRAExperts):
            transposed = module.layout.transposed
            for weight in module.layout.weights:
                updates[f"{name}.{weight}"] = Update(
                    *module.operand(weight), SCALING_MODE, transposed
                )
    _check_size(updates)
    return updates


@torch.no_grad()
def merge(update: Update) -> tuple[torch.Tensor, MergeError]:
    """Return ``W + s B A`` in W's format, shape and dtype, and the rounding error; inputs are unchanged."""
    weight, a, b = update.weight, update.lora_a, update.lora_b
    base = weight.mT if update.transposed else weight  # [..., out, in]
    parts, norms = [], []
    with torch.autocast(base.device.type, enabled=False):
        for matrices in zip(base, a, b, strict=True) if base.dim() == 3 else [(base, a, b)]:
            part, norm = _merge_matrix(*matrices, update.scaling, update.scaling_mode)
            parts.append(part)
            norms.append(norm)
    merged = torch.stack(parts) if base.dim() == 3 else parts[0]
    *columns, common = zip(*norms, strict=True)
    lost, total, delta, change = (math.hypot(*column) for column in columns)
    kept = sum(common) / max(change, delta) ** 2 if delta else 1.0
    error = MergeError(_ratio(lost, total), _ratio(lost, delta), kept)
    return (merged.mT if update.transposed else merged).contiguous(), error


def _merge_matrix(
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    mode: ScaleCalculationMode | None,
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """``w [out, in]`` plus its update D; norms of rounding error, sum, D and change C; and <C, D>."""
    values = _values(w)
    if mode is None:
        w = values.to(w.dtype)
    a, b = (t.to(w.device, torch.float32) for t in (a, b))
    delta = scaling * (b @ a)
    total = torch.addmm(values, b, a, alpha=scaling)
    merged = _stored(total, w, mode) if delta.any() else w
    stored = _values(merged)
    change = stored - values
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.float64).item()
        for t in (stored - total, total, delta, change)
    ]
    return merged, (*norms, change.mul_(delta).sum(dtype=torch.float64).item())


def _values(w: torch.Tensor) -> torch.Tensor:
    return w.dequantize(torch.float32) if isinstance(w, MXTensor) else w.float()


def _stored(
    values: torch.Tensor, like: torch.Tensor, mode: ScaleCalculationMode | None
) -> torch.Tensor:
    """Quantize fp32 ``values`` to the format of ``like``, or round them to its dtype."""
    if not isinstance(like, MXTensor):
        return values.to(like.dtype)
    packed = MXTensor.from_hp(values, like.format, mode, activation=like.activation)
    return packed.replace(orig_dtype=like.orig_dtype)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _scaling(config: dict[str, Any]) -> float:
    """The factor of an adapter's product; rank and scale are checked by ``MXWeightOnlyLoRAConfig``."""
    fields = {name: config.get(name) for name in ("r", "lora_alpha")}
    try:
        ours = MXWeightOnlyLoRAConfig(use_rslora=config.get("use_rslora", False), **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{ADAPTER_CONFIG}: {error}; save the adapter again") from None
    return ours.scaling


def _check_bare(model: nn.Module) -> None:
    """Refuse a model that has adapters: a file's adapters belong to the weights without any."""
    for name, module in model.named_modules():
        if isinstance(module, (MXLoRALinear, MXLoRAExperts)) or hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} already has adapters, in a {type(module).__name__}; merge into the model that "
                f"from_pretrained returns. To merge adapters made by quantize_, use "
                f"save_pretrained(merge_adapters=True); remove PEFT's with its unload()"
            )


def _adapters_in(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], model: nn.Module
) -> list[Adapter]:
    """The adapters that a file with the keys of ``tensors`` must hold to be merged into ``model``.

    Raises:
        ValueError: no adapters; the config does not tell which of a module's weights are adapted; weights
            that cannot be merged into.
    """
    found: dict[str, set[str]] = {}  # module: how deep PEFT's wrappers are nested
    for key in tensors:
        if match := _KEY.fullmatch(key):
            found.setdefault(match[1], set()).add(match[2])
    targets = tuple(config.get("target_parameters") or ())
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    adapters, problems, modules = [], [], dict(model.named_modules())
    for name, module in modules.items():
        if name not in found:
            continue
        weights = _weights_of(module)
        named = [w for w in weights if f".{name}.{w}".endswith(tuple(f".{t}" for t in targets))]
        if len(weights) > 1 and not named and len(found[name]) < len(weights):
            problems.append(
                f"{name}: {ADAPTER_WEIGHTS} has adapters for {len(found[name])} of {', '.join(weights)}, but "
                f"target_parameters={config.get('target_parameters')!r} in {ADAPTER_CONFIG} does not tell "
                f"which: name them there"
            )
            continue
        transposed = len(weights) > 1 and layout_of(module).transposed
        for weight, key in peft_keys(name, named or weights).items():
            parameter = parameters_of(module)[weight]
            problem = _refusal(parameter, transposed, uses[id(parameter)])
            if problem:
                problems.append(f"{name}.{weight}: {problem}")
                continue
            *experts, n, k = (parameter.mT if transposed else parameter).shape
            shapes = (*experts, config["r"], k), (*experts, n, config["r"])
            a, b = (torch.empty(shape, device="meta") for shape in shapes)
            adapters.append(Adapter(f"{name}.{weight}", key, a, b, transposed))
    names = config.get("target_modules")
    for name in names if isinstance(names, list) else []:  # PEFT's files give last parts only
        linear = isinstance(name, str) and isinstance(modules.get(name), nn.Linear)
        if linear and name not in found:
            problems.append(
                f"{name}: target_modules in {ADAPTER_CONFIG} names it, but its adapter is missing; copy both "
                f"files again, or save the adapter again"
            )
    raise_problems(problems, f"{ADAPTER_WEIGHTS} cannot be merged")
    if not tensors:
        raise ValueError(f"{ADAPTER_WEIGHTS} is empty; save the adapter again")
    return adapters


def _weights_of(module: nn.Module) -> list[str]:
    """The parameters that may have adapters, in the order of registration."""
    if isinstance(module, nn.Linear):
        return ["weight"] if parameters_of(module).get("weight") is not None else []
    layout = layout_of(module)
    return [n for n in parameters_of(module) if n in layout.weights] if layout else []


def _refusal(weight: nn.Parameter, transposed: bool, uses: int) -> str | None:
    """Why nothing can be merged into ``weight``."""
    if uses > 1:
        return "other modules share this parameter (tied embeddings) and would change with it; untie it"
    if isinstance(weight, MXTensor):
        along_input = weight.packed_axis == (-2 if transposed else -1)
        return (
            None if along_input else f"{weight} has blocks along its output axis; quantize it again"
        )
    if type(weight.data) is not torch.Tensor or weight.dtype not in HIGH_PRECISION_DTYPES:
        return (
            f"a {type(weight.data).__name__} of {weight.dtype}; adapters can be merged into MXTensors and "
            f"into plain bfloat16, float16 or float32"
        )
    return None


def _check_size(updates: dict[str, Update]) -> None:
    """Refuse adapters that are not finite, or whose product may overflow the weight's dtype."""
    problems = []
    for name, update in updates.items():
        a, b = (t.detach().float().abs().max().item() for t in (update.lora_a, update.lora_b))
        limit = torch.finfo(update.weight.dtype).max / 2
        if not update.scaling * update.lora_a.shape[-2] * a * b < limit:  # NaN fails it too
            problems.append(f"{name}: lora_A of up to {a:g} and lora_B of up to {b:g}")
    raise_problems(problems, "adapters overflow; take them from before training diverged")
