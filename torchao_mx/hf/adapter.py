"""Adapters in PEFT's layout: what it saves for ``LoraConfig(target_modules=, target_parameters=)``.

A linear layer has two tensors under its name: ``lora_A.weight [r, in]`` and ``lora_B.weight [out, r]``. For
3-D experts, PEFT wraps one parameter at a time in the order of their registration. The first one is therefore
innermost, and its keys have one ``base_layer.`` for each wrapper around it. One tensor holds all experts::

    lora_A.weight [E r, in]   = A [E, r, in], one expert after another
    lora_B.weight [out, r E]  = B [E, out, r] with the expert axis last

PEFT under transformers 4 confuses the two axes of gpt-oss weights: its ``lora_A [E r, out]`` holds ``B_e^T``,
its ``lora_B [in, r E]`` holds ``A_e^T``. Shapes tell the two layouts apart, except for a square weight; then
the module's other weight decides, since ``[H, 2 I]`` and ``[I, H]`` are never both square.

The metadata of the weight file, which PEFT ignores, repeats the config fields without which its tensors mean
nothing. A config and weights from different saves are thus detected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchao_mx.hf.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AGAIN,
    read_json,
    read_metadata,
    read_tensors,
)
from torchao_mx.hf.problems import raise_problems
from torchao_mx.hf.staging import save_tensors, staging, sync, write_json
from torchao_mx.nn.lora import MXLoRAExperts, MXLoRALinear
from torchao_mx.torch_internals import parameters_of

PREFIX = "base_model.model."
_MARK = "torchao_mx"  # metadata key of the weight file: the config's _PAIRED fields as JSON
_PAIRED = {"r": None, "lora_alpha": None, "use_rslora": False, "target_parameters": None}
# A peft_type that PEFT refuses; the record also holds the configs "before" and "after".
_INTERRUPTED = "INTERRUPTED_SAVE"

_Pair = tuple[torch.Tensor, torch.Tensor]  # lora_A and lora_B

# PEFT options under which training changed more than the file's two matrices.
_NO_COUNTERPART = (
    "use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that also change the base weights.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapter(NamedTuple):
    """One weight's adapters, or their required shapes on ``meta``, and PEFT's key for them."""

    weight: str  # full name of the adapted parameter, or of the linear layer
    key: str  # the file's prefix of lora_A.weight
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    transposed: bool = False  # stored [E, in, out]


def peft_keys(name: str, weights: list[str]) -> dict[str, str]:
    """PEFT's key prefix for each of a module's ``weights``, given in the order of registration."""
    return {
        weight: f"{PREFIX}{name}{'.' * bool(name)}{'base_layer.' * (len(weights) - 1 - i)}"
        for i, weight in enumerate(weights)
    }


def _adapters(model: nn.Module) -> Iterator[Adapter]:
    for name, module in model.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, MXLoRALinear):
            yield Adapter(name, f"{PREFIX}{dot}", module.lora_A, module.lora_B)
        elif isinstance(module, MXLoRAExperts):
            weights = [n for n in parameters_of(module) if n in module.layout.weights]
            for weight, key in peft_keys(name, weights).items():
                a, b = (parameters_of(module)[f"{weight}_lora_{s}"] for s in "AB")
                yield Adapter(f"{dot}{weight}", key, a, b, module.layout.transposed)


def _to_peft(adapter: Adapter) -> dict[str, torch.Tensor]:
    a, b = (
        t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        for t in (adapter.lora_a, adapter.lora_b)
    )
    if a.dim() == 3:
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    return {f"{adapter.key}lora_A.weight": a, f"{adapter.key}lora_B.weight": b}


def _from_peft(adapter: Adapter, a: torch.Tensor, b: torch.Tensor) -> _Pair:
    experts, r, k = adapter.lora_a.shape
    return a.view(experts, r, k), b.view(-1, r, experts).permute(2, 0, 1)


def _from_peft_v4(adapter: Adapter, a: torch.Tensor, b: torch.Tensor) -> _Pair:
    """As :func:`_from_peft`, for PEFT under transformers 4, which swaps A and B."""
    experts, r, _ = adapter.lora_a.shape
    lora_a = b.view(-1, r, experts).permute(2, 1, 0)
    lora_b = a.view(experts, r, -1).transpose(1, 2)
    return lora_a, lora_b


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The PEFT config that all adapters of ``model`` share."""
    configs = {
        (config.r, config.lora_alpha, config.use_rslora)
        for config in (
            module.lora_config if isinstance(module, MXLoRAExperts) else module.config
            for module in model.modules()
            if isinstance(module, (MXLoRALinear, MXLoRAExperts))
        )
    }
    if len(configs) != 1:
        found = ", ".join(f"r={r} alpha={a} use_rslora={s}" for r, a, s in sorted(configs))
        raise ValueError(
            f"the model has {f'adapters of several kinds ({found})' if configs else 'no adapters'}; one file "
            f"holds the adapters of one MXWeightOnlyLoRAConfig"
        )
    r, alpha, use_rslora = configs.pop()
    names = [adapter.weight for adapter in _adapters(model)]
    modules = [name for name, m in model.named_modules() if isinstance(m, MXLoRALinear)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        "target_parameters": [name for name in names if name not in modules] or None,
    }


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Save a model's adapters as PEFT does, for PEFT, vLLM or :func:`load_adapter`.

    Adapters that FSDP2 or :class:`torchao_mx.distributed.ExpertParallel` has split are gathered: all ranks
    must call this, and rank 0 writes.

    Args:
        model: contains :class:`MXLoRALinear` or :class:`MXLoRAExperts`, all with one config.
        path: a folder; its ``adapter_config.json`` and ``adapter_model.safetensors`` are replaced. If the
            process is killed, :func:`load_adapter` loads either the old or the new adapter. So does PEFT, but
            it refuses the config if killed between the two files while rank, scale or targets change.

    Raises:
        ValueError: no adapters, or adapters of several ranks or scales; ``path`` is a file.
        OSError: the folder is not writable; its files are unchanged.
    """
    config, tensors = _config_of(model), {}
    adapters = list(_adapters(model))
    for adapter in adapters:
        tensors |= {key: t.contiguous().cpu() for key, t in _to_peft(adapter).items()}
    if not any(isinstance(adapter.lora_a, DTensor) for adapter in adapters):
        _write(tensors, config, Path(path))
        return
    try:
        if dist.get_rank() == 0:
            _write(tensors, config, Path(path))
    finally:
        dist.barrier()


def _write(tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staging(folder, size) as stage:
        mark = {"format": "pt", _MARK: json.dumps(_paired(config))}
        save_tensors(tensors, stage / ADAPTER_WEIGHTS, mark)
        write_json(config, stage / ADAPTER_CONFIG, sort_keys=True)
        sync(stage / ADAPTER_WEIGHTS)
        target = stage.parent
        try:
            before = _read_config(target)
        except (OSError, ValueError):  # no loadable adapter to preserve
            before = None
        if before is not None and _paired(before) != _paired(config):
            both = {"peft_type": _INTERRUPTED, "before": before, "after": config}
            write_json(both, stage / "both.json", sort_keys=True)
            os.replace(stage / "both.json", target / ADAPTER_CONFIG)
            sync(target)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            os.replace(stage / name, target / name)
            sync(target)


def _paired(config: dict[str, Any]) -> dict[str, Any]:
    """The config fields without which the tensors beside it mean nothing."""
    found = {name: config.get(name, default) for name, default in _PAIRED.items()}
    targets = found["target_parameters"]
    return found | {
        "target_parameters": sorted(map(str, targets)) if isinstance(targets, list) else targets
    }


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load an adapter that :func:`save_adapter` or PEFT saved into a model; everything is checked first.

    An adapter that PEFT trained on gpt-oss under transformers 4 is converted. If the model's adapters are
    split over ranks, each rank loads its part.

    Args:
        model: has :class:`MXLoRALinear` or :class:`MXLoRAExperts` wherever the file has adapters, with the
            file's rank and scale.
        path: a folder.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: another kind, rank or scale of adapter; files from different saves; tensors that are
            missing, unknown, misshapen or not floating. The message names each; the model is unchanged.
    """
    config, tensors = read_adapter(path)
    check_config(config, _config_of(model))
    adapters = list(_adapters(model))
    pairs = checked_pairs(adapters, tensors, "adapter")
    with torch.no_grad():
        for adapter, pair in zip(adapters, pairs, strict=True):
            for parameter, value in zip((adapter.lora_a, adapter.lora_b), pair, strict=True):
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(
                        value.to(parameter.device, parameter.dtype), parameter.device_mesh,
                        parameter.placements, src_data_rank=None,
                    )  # fmt: skip
                parameter.copy_(value)


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the config and the tensors of the adapter in the folder ``path``, without checking their fit.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, the two are from different saves, or a field has a wrong type.
    """
    folder = Path(path)
    config = _read_config(folder)
    return config, read_tensors(folder / ADAPTER_WEIGHTS)


def _read_config(folder: Path) -> dict[str, Any]:
    """The config that the weights in ``folder`` were saved with; only the weight file's header is read."""
    config = read_json(folder / ADAPTER_CONFIG)
    mark = read_metadata(folder / ADAPTER_WEIGHTS).get(_MARK, "null")
    try:
        saved = json.loads(mark)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS}: {_MARK} in its metadata is not JSON ({error}); {AGAIN}"
        ) from error
    if config.get("peft_type") == _INTERRUPTED:
        before, after = config.get("before"), config.get("after")
        config = after if isinstance(after, dict) and _paired(after) == saved else before
        if not isinstance(config, dict):
            raise ValueError(
                f"{folder / ADAPTER_CONFIG}: left by an interrupted save; save the adapter again"
            )
    targets = config.get("target_parameters")
    if not isinstance(targets, (list, type(None))):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: target_parameters={targets!r}; it must be a list of names: save the "
            f"adapter again"
        )
    found = _paired(config)
    if saved is not None and saved != found:
        there = saved if isinstance(saved, dict) else {}
        differences = ", ".join(
            f"{name}={found[name]!r} and {there.get(name)!r}"
            for name in _PAIRED
            if found[name] != there.get(name)
        )
        raise ValueError(
            f"{folder}: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} are from different saves: {differences}; "
            f"copy both files again, or save the adapter again"
        )
    return config


def check_config(config: dict[str, Any], ours: dict[str, Any] | None = None) -> None:
    """Refuse an adapter of an unsupported kind or, with ``ours`` given, of another rank or scale.

    Raises:
        ValueError: it lists every problem.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{ADAPTER_CONFIG}: peft_type={config.get('peft_type')!r}; only 'LORA' adapters can be loaded: "
            f"give the folder of one"
        )
    problems = [
        f"{name}={config[name]!r} is not supported; train without it, or use PEFT on the model in high "
        f"precision"
        for name in _NO_COUNTERPART
        if config.get(name)
    ]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_WEIGHTS):
        problems.append(
            f"init_lora_weights={init!r} changed the base weights; save the adapter with PEFT's "
            f"path_initial_model_for_weight_conversion"
        )
    for name, default in (("r", None), ("lora_alpha", None), ("use_rslora", False)):
        found = config.get(name, default)
        if ours is not None and found != ours[name]:
            problems.append(
                f"{name}={found!r}, but the model's adapters have {ours[name]!r}; give quantize_ an "
                f"MXWeightOnlyLoRAConfig with the file's value"
            )
    if config.get("bias", "none") != "none":
        problems.append(
            f"bias={config['bias']!r}; biases are frozen here: train with bias='none', or use PEFT on "
            f"the model in high precision"
        )
    if problems:
        raise ValueError(f"{ADAPTER_CONFIG}: " + "\n".join(problems))


def checked_pairs(
    adapters: list[Adapter], tensors: dict[str, torch.Tensor], place: str
) -> list[_Pair]:
    """Return ``(lora_A, lora_B)`` for each adapter from the file's ``tensors``, in the model's layout.

    Raises:
        ValueError: tensors that are missing, not floating, or of a shape that neither PEFT layout has;
            tensors for which the model has no ``place``.
    """
    problems, pairs, known = [], [], set()
    for adapter in adapters:
        keys = [f"{adapter.key}lora_{s}.weight" for s in "AB"]
        known |= set(keys)
        missing = [key for key in keys if key not in tensors]
        problems += [f"{key} is missing" for key in missing]
        if missing:
            continue
        a, b = (tensors[key] for key in keys)
        wanted = _shapes(adapter)
        if (a.shape, b.shape) not in wanted:
            shapes = " or ".join(f"{list(x)} and {list(y)}" for x, y in wanted)
            problems.append(
                f"{keys[0]} and lora_B have shapes {list(a.shape)} and {list(b.shape)}, not {shapes}"
            )
        problems += [
            f"{key} has dtype {t.dtype}, not a floating one"
            for key, t in zip(keys, (a, b), strict=True)
            if not t.is_floating_point()
        ]
        pairs.append((a, b))
    problems += [f"{key}: the model has no {place} there" for key in tensors if key not in known]
    raise_problems(
        problems,
        f"{ADAPTER_WEIGHTS} does not fit the model; use the model that it was trained on, with adapters in "
        f"the same places, or save the adapter again",
    )
    convert = _conversion(adapters, pairs)
    return [
        pair if adapter.lora_a.dim() == 2 else convert(adapter, *pair)
        for adapter, pair in zip(adapters, pairs, strict=True)
    ]


def _shapes(adapter: Adapter) -> list[tuple[torch.Size, torch.Size]]:
    """The shapes that lora_A and lora_B may have in the file: under transformers 5, then 4."""
    if adapter.lora_a.dim() == 2:
        return [(adapter.lora_a.shape, adapter.lora_b.shape)]
    experts, r, k = adapter.lora_a.shape
    n = adapter.lora_b.shape[1]
    sizes = ((k, n), (n, k)) if adapter.transposed and k != n else ((k, n),)
    return [(torch.Size((experts * r, i)), torch.Size((o, r * experts))) for i, o in sizes]


def _conversion(
    adapters: list[Adapter], pairs: list[_Pair]
) -> Callable[[Adapter, torch.Tensor, torch.Tensor], _Pair]:
    """The conversion of the experts' adapters: one per file, told by the weights that are not square."""
    found = {
        (a.shape, b.shape) == shapes[0]
        for adapter, (a, b) in zip(adapters, pairs, strict=True)
        if len(shapes := _shapes(adapter)) > 1
    }
    if len(found) > 1:
        raise ValueError(
            f"{ADAPTER_WEIGHTS}: some adapters have PEFT's shapes under transformers 5, others those under "
            f"transformers 4; save them all again under one version"
        )
    transposed = [adapter.weight for adapter in adapters if adapter.transposed]
    if transposed and not found:
        raise ValueError(
            f"{ADAPTER_WEIGHTS}: {transposed[0]} is square, so PEFT gives its adapters the same shapes under "
            f"transformers 5 and 4, with different meanings; add adapters for the module's other weight, "
            f"whose shapes decide (zeros will do)"
        )
    return _from_peft_v4 if found == {False} else _from_peft
