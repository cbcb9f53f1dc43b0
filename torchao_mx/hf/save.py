"""save_pretrained: a model in memory as the source of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from torchao_mx.hf.config import tied_names
from torchao_mx.hf.layouts import gpt_oss
from torchao_mx.hf.merge import MergeError, Update, merge, updates_of, warn_of_lost
from torchao_mx.hf.publish import check_target
from torchao_mx.hf.write import Source, bytes_of, contents, write
from torchao_mx.nn.lora import MXLoRAExperts, MXLoRALinear


def save_pretrained(
    model: PreTrainedModel,
    path: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    merge_adapters: bool = False,
) -> dict[str, MergeError]:
    """Save a gpt-oss model as published ones are: experts in MXFP4 blocks and scales, the rest as it is.

    Stock transformers of both versions loads the folder, where it dequantizes to the values of
    ``MXTensor.dequantize()`` bit for bit; so does :func:`from_pretrained`, to the same bytes. Other files of
    an existing folder, such as a tokenizer's, stay. On any error the folder is as it was; if the process is
    killed, the old checkpoint loads or the new one, and the next save removes what is left. How weights
    quantize their activations (``MXTensor.activation``) is not part of the layout, nor are packed linear
    layers: their values are written unpacked.

    Args:
        model: every expert weight an MXFP4 :class:`MXTensor`, from :func:`from_pretrained` or converted after
            quantization-aware training; no adapters but with ``merge_adapters``.
        path: the folder to write, new or existing.
        max_shard_size: of a file, in bytes, or as "5GB"; a tensor is never split.
        merge_adapters: add the adapters of :class:`MXLoRAExperts` and :class:`MXLoRALinear` to what is
            written, as :func:`merge_adapter` does, one weight at a time; into linear layers unpacked, in the
            weight's logical dtype.
            The model itself stays as it is.

    Returns:
        What rounding cost, by the full name of each weight with merged adapters; empty where there are none.
        **Small updates vanish in 4 bits**: see :class:`MergeError` before serving the result. Weights that
        lost theirs are warned of.

    Raises:
        TypeError: the model is wrapped in another, of PEFT say.
        NotImplementedError: the model has no experts that the layout is for.
        ValueError: a tensor that the layout has no place for or that could not be loaded again, each named;
            adapters that overflow; ``max_shard_size`` is no size, or ``path`` a file; with
            ``merge_adapters``, a folder with an adapter; a generation config that transformers refuses.
        OSError: the folder may not be written into, has no room, or another save into it is under way.

    Example::

        model = from_pretrained("openai/gpt-oss-20b")
        save_pretrained(model, "gpt-oss-20b-tuned")
    """
    limit = bytes_of(max_shard_size)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it is transformers' own, as from_pretrained gives: take it "
            f"out of what wraps it, of PEFT's adapters by unload()"
        )
    check_target(path, merge_adapters)
    return save_model(model, path, limit, updates_of(model) if merge_adapters else {})


def save_model(
    model: PreTrainedModel,
    path: str | Path,
    limit: int,
    updates: Mapping[str, Update],
    others: Path | None = None,
) -> dict[str, MergeError]:
    """:func:`save_pretrained` with ``updates`` merged, and files as those of the folder ``others`` beside."""
    errors: dict[str, MergeError] = {}
    source = model_source(model, updates, errors)._replace(others=others)
    write(source, gpt_oss, path, limit)
    warn_of_lost(errors)
    return errors


def packed_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's ``state_dict`` with blocks and scales, views, for each packed weight; tied tensors once.

    Raises:
        NotImplementedError, ValueError: as :func:`save_pretrained`.
    """
    _, tensors = contents(model_source(model, {}, {}), gpt_oss)
    return dict(tensors)


def model_source(
    model: PreTrainedModel, updates: Mapping[str, Update], errors: dict[str, MergeError]
) -> Source:
    """The model's tensors; without its adapters if there are ``updates``, which are merged as they are read.

    What merging costs comes to ``errors``.
    """
    for name in tied_names(model) & updates.keys():
        raise ValueError(
            f"{name}: has adapters, and model.config ties it to another tensor; set "
            f"tie_word_embeddings=False there"
        )
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (updates and _is_adapter(model, name))
    }

    def read(name: str) -> torch.Tensor:
        if name not in updates:
            return state[name]
        merged, errors[name] = merge(updates[name])
        return merged

    return Source(type(model).__name__, model, state, read)


def adapters_in(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Our adapters, by their names in the model."""
    return {name: t for name, t in model.state_dict().items() if _is_adapter(model, name)}


def _is_adapter(model: PreTrainedModel, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    ours = isinstance(owner, (MXLoRALinear, MXLoRAExperts))
    return ours and name.endswith(("lora_A", "lora_B"))
