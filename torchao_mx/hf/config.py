"""Read a checkpoint's config.json and generation_config.json, and build its model without memory.

A wrong field makes transformers fail somewhere in its own code. Here that becomes a ``ValueError`` that names
the file, with transformers' error as its cause.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from torchao_mx.hf.files import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, Entry, read_json
from torchao_mx.hf.layouts.gpt_oss import BLOCKS, SCALES
from torchao_mx.hf.transformers_internals import tied_keys
from torchao_mx.torch_internals import children_of

# v5's weight files of single ranks, which it reads before any others.
_RANK_FILE = "shard-[0-9]*-model-*.safetensors"
# Fields that count what a model's constructor builds one by one.
_COUNTS = re.compile(r".*(layers?|experts|labels)")
_REMEDY = "use the files that were published with these weights"
_PASSED = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)


@contextlib.contextmanager
def from_transformers(place: Path, remedy: str, *passed: type[Exception]) -> Iterator[None]:
    """Turn whatever transformers raises into a ``ValueError`` that names ``place`` and ``remedy``.

    Errors that are not about the files pass unchanged: network, memory, and the classes in ``passed``.
    """
    try:
        yield
    except (*_PASSED, *passed):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) < 400 else f"{text[:400]}..."
        if isinstance(error, ImportError):  # an attention kernel, or code that the config names
            remedy = "install that package, or use a config.json that does not need it"
        raise ValueError(
            f"{place}: transformers stopped with {type(error).__name__}: {text}; {remedy}"
        ) from error


def load_config(
    folder: Path, entries: Collection[Entry], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the model's config in ``folder``, and the ``options`` that are not fields of it.

    Args:
        folder: a checkpoint's folder.
        entries: its tensors, which limit the numbers of layers and experts.
        options: keyword arguments of transformers' from_pretrained; config fields among them are set.

    Raises:
        OSError: a file is missing or cannot be opened.
        ValueError: ``config.json`` or ``generation_config.json`` is damaged or describes no model; ``folder``
            also has other weights, which transformers would read instead of the checked ones.
    """
    record = read_json(folder / CONFIG)
    _check_counts(record, folder / CONFIG, entries)
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: an adapter beside a whole model, which transformers may or may not "
            f"apply; move the adapter into a folder of its own and load it with load_adapter or PEFT"
        )
    for file in sorted(folder.glob(_RANK_FILE)):
        raise ValueError(
            f"{file}: belongs to one rank, and transformers may read it instead of the checkpoint; move such "
            f"files into a folder of their own"
        )
    with from_transformers(folder / CONFIG, _REMEDY):
        found = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
    if (folder / GENERATION_CONFIG).exists():
        read_json(folder / GENERATION_CONFIG)
        with from_transformers(folder / GENERATION_CONFIG, f"{_REMEDY}, or remove it"):
            GenerationConfig.from_pretrained(folder)
    return found


def _check_counts(record: dict[str, Any], file: Path, entries: Collection[Entry]) -> None:
    """Refuse more layers or experts than the tensors allow; they would take ages to build."""
    limit = max((len(entries), *(size for entry in entries for size in entry.shape)))
    for key, value in record.items():
        if isinstance(value, dict):
            _check_counts(value, file, entries)
        elif isinstance(value, (int, float)) and _COUNTS.fullmatch(key) and value > limit:
            raise ValueError(
                f"{file}: {key}={value}, but the checkpoint has {len(entries)} tensors; {_REMEDY}"
            )


def build_skeleton(auto_class: Any, config: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """Build the model of ``config`` on ``meta`` with ``auto_class.from_config``.

    Raises:
        ValueError: ``auto_class`` cannot build it.
    """
    build = functools.partial(auto_class.from_config, **options)
    with from_transformers(folder / CONFIG, _REMEDY):
        return skeleton_of(build, config)


def skeleton_of(build: Callable[[Any], PreTrainedModel], config: Any) -> PreTrainedModel:
    """``build(config)`` without memory, for the names and shapes of the model's tensors."""
    with torch.device("meta"):
        return build(copy.deepcopy(config))


def tied_names(model: PreTrainedModel) -> set[str]:
    """Second names of tied tensors, which a checkpoint does not store."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return tied_keys(model)


def has_owner(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor that ``model`` lacks belongs to one of its modules and would change its output.

    True for a bias that the module was built without, or a layer after the last one. False for a part beside
    the layers: an image encoder, another task's head, or DeepSeek-V3's layers that predict further tokens.
    """
    *owners, _ = parts = name.split(".")
    module, depth = model, 0
    while depth < len(owners) and children_of(module).get(owners[depth]) is not None:
        module = children_of(module)[owners[depth]]
        depth += 1
    if isinstance(module, nn.ModuleList) and parts[depth].isdecimal():
        more = getattr(model.config, "num_nextn_predict_layers", None)
        more = more if isinstance(more, int) else 0
        further = {str(i) for i in range(len(module), len(module) + more)}
        return parts[depth] not in further
    holds_layers = any(isinstance(child, nn.ModuleList) for child in module.modules())
    return any(part.isdecimal() for part in parts[:depth]) or not holds_layers


def checked_method(config: Any, entries: Collection[str], folder: Path) -> str | None:
    """The ``quant_method`` of a checkpoint's config; None if the config has no quantization.

    Raises:
        ValueError: the quantization names no method, or config and tensors disagree on being packed.
    """
    record = getattr(config, "quantization_config", None)
    method = record.get("quant_method") if isinstance(record, dict) else None
    if record is not None and not isinstance(method, str):
        raise ValueError(
            f"quantization_config={record!r} in config.json names no quant_method; use the "
            f"config.json of this checkpoint, which for gpt-oss's layout has {{'quant_method': 'mxfp4'}}"
        )
    packed = sorted(name for name in entries if name.endswith((BLOCKS, SCALES)))
    if method is None and packed:
        raise ValueError(
            f"{packed[0]}: packed, but config.json of {folder} has no quantization_config; for gpt-oss's "
            f"layout it is {{'quant_method': 'mxfp4'}}: download config.json again"
        )
    if method == "mxfp4" and not packed:
        raise ValueError(
            f"{folder}: config.json says quant_method='mxfp4', but no tensor is called *{BLOCKS}: the "
            f"weights are in high precision. Remove quantization_config from config.json; then load with "
            f"config=MXWeightOnlyConfig(), or pack the folder with torchao-mx quantize"
        )
    return method
