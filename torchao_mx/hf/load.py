"""from_pretrained: load a causal language model with packed weights, or pack them while loading."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchao_mx.errors import check_high_precision
from torchao_mx.hf.checkpoint import check_checkpoint, read_folder
from torchao_mx.hf.complete import check_complete, load_whole
from torchao_mx.hf.config import build_skeleton, checked_method, from_transformers, load_config
from torchao_mx.hf.files import Entry
from torchao_mx.hf.quantizer import NAME
from torchao_mx.hf.versions import is_v5
from torchao_mx.hf.while_loading import PTQConfig, packs_while_loading, report_of, selection
from torchao_mx.nn.check_model import check_layers

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Options for transformers, both when it reads the model's config and when it loads.
_LOAD_OPTIONS = (*_HUB_OPTIONS, "code_revision", "trust_remote_code")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_REFUSED = frozenset(
    [
        "adapter_kwargs",
        "device_mesh",
        "distributed_config",
        "from_flax",
        "from_tf",
        "gguf_file",
        "output_loading_info",
        "quantization_config",
        "state_dict",
        "subfolder",
        "torch_dtype",
        "tp_plan",
        "tp_size",
        "variant",
    ]
)


def from_pretrained(
    path: str | Path,
    *,
    config: AOBaseConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    auto_class: Any = AutoModelForCausalLM,
    device_map: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    **kw: Any,
) -> PreTrainedModel:
    """Load a model of transformers with its weights in a block format, ready to be trained.

    A checkpoint in MXFP4 (gpt-oss) stays packed: each expert weight becomes a frozen :class:`MXTensor` that
    holds the file's bytes and has the logical shape that the model's class declares, ``gate_up_proj
    [E, H, 2 I]`` and ``down_proj [E, I, H]``. No bf16 copy is made on the host or the device. All other
    parameters are trainable and in ``dtype``. Experts compute through ``nn.experts.pipeline``. The whole
    checkpoint is checked first.

    A checkpoint in high precision is quantized with ``config``: every module of experts that
    :func:`torchao_mx.is_experts` knows and every ``nn.Linear``, except output heads, routers, gates, layers
    with one output, and sizes that do not fit the format. One warning lists what stays in high precision
    apart from heads, and why; this includes 3-D weights of unknown classes
    (:func:`torchao_mx.register_experts`). With ``MXWeightOnlyConfig`` or
    ``MXDynamicActivationMXWeightConfig``, each weight is read in ``dtype`` and packed at once, so only a few
    weights are in high precision at a time. The result is the same as loading the model in ``dtype`` and then
    calling ``quantize_``, which is what happens with every other config: ``QATConfig`` trains the weights in
    high precision. For LoRA, load with ``MXWeightOnlyConfig`` and then call ``quantize_`` with an
    ``MXWeightOnlyLoRAConfig``, which keeps packed weights.

    With an ``auto_class`` other than ``AutoModelForCausalLM``, tensors outside the base model that the
    checkpoint lacks, such as a classifier's ``score``, are newly initialized, and transformers warns of it;
    heads stay in high precision.

    transformers has no layout for a model packed by ``config``: its ``model.save_pretrained`` saves adapters
    alone and otherwise raises, and ``model.config`` names no quantization.

    Args:
        path: a folder, or a name on the Hub.
        config: for a checkpoint in high precision, a ``quantize_`` config such as ``MXWeightOnlyConfig()``.
        filter_fn: ``(module, name) -> bool``, selects the modules to quantize instead of the rules above,
            heads and routers included. It is not called for weights that are packed already.
        auto_class: an auto class of transformers, such as ``AutoModelForSequenceClassification``.
        device_map: as in transformers; packed weights are not offloaded to the CPU or to disk.
        dtype: the dtype of everything that is not packed, and the logical dtype of packed weights.
        kw: further options of ``auto_class.from_pretrained``.

    Returns:
        The model, in evaluation mode as transformers returns it.

    Raises:
        TypeError: ``config`` is not a ``quantize_`` config, ``filter_fn`` not a function, ``auto_class`` not
            an auto class of transformers, ``dtype`` not a floating dtype, or ``kw`` has options that this
            function sets or does not take.
        ValueError: the checkpoint is damaged or has another quantization; tensors are missing, left over or
            misshapen, each named (parts of other models, such as an image encoder, are ignored); ``config``
            fits no layer, or not all that ``filter_fn`` selects; ``filter_fn`` selects nothing or is given
            for a packed checkpoint.
        OSError: a file cannot be opened.
        NotImplementedError: the checkpoint is in MXFP4 and its experts are of no known class.

    Example::

        model = from_pretrained("openai/gpt-oss-20b", device_map="auto")
        model.model.layers[0].mlp.experts.down_proj
        # MXTensor(shape=(32, 2880, 2880), mxfp4, orig_dtype=bfloat16, packed_axis=-2, device=cuda:0)
    """
    check_high_precision(dtype, "dtype")
    if config is not None and not isinstance(config, AOBaseConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; give a config of quantize_ such as MXWeightOnlyConfig(); "
            f"transformers' own is read from the folder"
        )
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn={filter_fn!r} must be a function (module, name) -> bool")
    if not (hasattr(auto_class, "from_pretrained") and hasattr(auto_class, "from_config")):
        raise TypeError(
            f"auto_class={auto_class!r} must be one of transformers' auto classes, such as "
            f"AutoModelForSequenceClassification"
        )
    refused = sorted(kw.keys() & _REFUSED)
    if refused:
        raise TypeError(
            f"{', '.join(refused)}: not supported, since each process reads the whole folder; use config= "
            f"for the quantization, dtype= for the dtype, device_map= for the placement"
        )
    if kw.pop("use_safetensors", None) is False:
        raise TypeError(
            "use_safetensors=False: only safetensors are read; convert the weights to them"
        )
    folder = _local_folder(path, kw)
    entries = read_folder(folder)
    model_config, kw = _read_configs(folder, entries, kw)
    method = checked_method(model_config, entries, folder)
    options = {"device_map": device_map, "dtype": dtype, **kw}
    if method is None:
        model = _load_and_quantize(
            folder, entries, model_config, config, filter_fn, auto_class, options
        )
    elif method != "mxfp4":
        raise ValueError(
            f"{folder}: config.json says quant_method={method!r}; only 'mxfp4' is read here, and "
            f"high-precision checkpoints with config=: load this one with transformers' own from_pretrained"
        )
    elif config is not None or filter_fn is not None:
        raise ValueError(
            f"{folder}: packed in mxfp4 already; config={config} would quantize it again, and filter_fn "
            f"chooses what config quantizes: leave both out, and give them to quantize_ for the layers that "
            f"are not packed"
        )
    else:
        model = _load_packed(folder, entries, model_config, auto_class, options)
    # PEFT stores this name: it must be the Hub's, not that of a cache folder.
    model.name_or_path = model.config.name_or_path = str(path)
    return model


def _local_folder(path: str | Path, kw: dict[str, Any]) -> Path:
    """The folder with the files, downloaded if necessary; the Hub's options are then removed from ``kw``."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path is {path!r}; give a checkpoint's folder, or a name on the Hub")
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or Path(path).is_absolute() or str(path).startswith((".", "~")):
        raise ValueError(
            f"{path}: no such folder; give a checkpoint's folder, or a name on the Hub"
        )
    from huggingface_hub import snapshot_download

    options = {name: kw.pop(name) for name in _HUB_OPTIONS if name in kw}
    wanted = ["*.json", "*.safetensors"]
    if kw.get("trust_remote_code"):
        wanted.append("*.py")
    with from_transformers(path, "give a checkpoint's folder, or a name on the Hub"):
        # Subfolders hold copies of the weights for other programs.
        folder = snapshot_download(
            str(path), allow_patterns=wanted, ignore_patterns=["*/*"], **options
        )
    return Path(folder)


def _read_configs(
    folder: Path, entries: dict[str, Entry], kw: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model's config, with the fields that ``kw`` sets, and the rest of ``kw``, for loading."""
    loads = {name: kw[name] for name in _LOAD_OPTIONS if name in kw}
    fields = {name: value for name, value in kw.items() if name not in _IMPLEMENTATIONS}
    config, unused = load_config(folder, entries.values(), **fields)
    implementations = {name: kw[name] for name in _IMPLEMENTATIONS if name in kw}
    return config, {**unused, **loads, **implementations}


def _load_packed(
    folder: Path, entries: dict[str, Entry], config: Any, auto_class: Any, options: dict[str, Any]
) -> PreTrainedModel:
    config = copy.deepcopy(config)
    record = config.quantization_config
    del config.quantization_config
    skeleton = build_skeleton(auto_class, config, folder)
    new_head = auto_class is not AutoModelForCausalLM
    found = _without_new_heads(entries, skeleton) if new_head else entries
    check_checkpoint(found, skeleton, folder)
    config.quantization_config = record | {"quant_method": NAME}
    if is_v5():
        options = {"experts_implementation": NAME, **options}
    return load_whole(auto_class, folder, entries, new_head=new_head, config=config, **options)


def _without_new_heads(entries: dict[str, Entry], skeleton: PreTrainedModel) -> dict[str, Entry]:
    """Drop the skeleton's heads that ``entries`` lack; return the ``entries`` that belong to the rest."""
    inside = f"{skeleton.base_model_prefix}."
    for name, child in list(skeleton.named_children()):
        stored = any(f"{name}.{key}" in entries for key in child.state_dict())
        if child is not skeleton.base_model and not stored:
            delattr(skeleton, name)
    names = skeleton.state_dict().keys()
    return {n: entry for n, entry in entries.items() if n in names or n.startswith(inside)}


def _load_and_quantize(
    folder: Path,
    entries: dict[str, Entry],
    model_config: Any,
    config: AOBaseConfig | None,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    auto_class: Any,
    options: dict[str, Any],
) -> PreTrainedModel:
    if config is None:
        raise ValueError(
            f"{folder}: config.json has no quantization_config, so the checkpoint is in high precision; say "
            f"how to quantize it, for example with config=MXWeightOnlyConfig()"
        )
    skeleton = build_skeleton(
        auto_class, model_config, folder, dtype=options["dtype"],
        trust_remote_code=options.get("trust_remote_code", False),
    )  # fmt: skip
    selects, left = selection(skeleton, config, filter_fn)
    check_layers(skeleton, config, selects)
    if not any(selects(module, name) for name, module in skeleton.named_modules()):
        raise ValueError(
            f"{folder}: {type(skeleton).__name__} has nothing to quantize: filter_fn selects no module, or "
            f"there is no linear layer and no known module of experts; load it with transformers' own "
            f"from_pretrained"
        )
    new_head = auto_class is not AutoModelForCausalLM
    ignore_mismatched = bool(options.get("ignore_mismatched_sizes"))
    check_complete(
        entries, skeleton, folder, ignore_mismatched=ignore_mismatched, new_head=new_head
    )
    if left:
        warnings.warn(f"{folder}: left in high precision:\n{report_of(left)}", stacklevel=3)
    if packs_while_loading(skeleton, config, options):
        options = {"quantization_config": PTQConfig(config, selects), **options}
    model = load_whole(
        auto_class, folder, entries, new_head=new_head, config=model_config, **options
    )
    quantize_(model, config, filter_fn=selects)
    return model
