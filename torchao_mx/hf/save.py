"""save_pretrained: write a checkpoint from a model in memory."""

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
    """Save a gpt-oss model in the published layout: experts in MXFP4 blocks and scales, the rest unchanged.

    Stock transformers 4 and 5 load the folder and dequantize to the values of ``MXTensor.dequantize()`` bit
    for bit; :func:`from_pretrained` loads the same bytes. Other files in an existing folder, such as a
    tokenizer's, stay. On any error the folder is unchanged; if the process is killed, either the old or the
    new checkpoint loads, and the next save cleans up. The layout does not record how weights quantize their
    activations (``MXTensor.activation``). It has no packed linear layers: their values are written unpacked.

    Args:
        model: every expert weight is an MXFP4 :class:`MXTensor`, from :func:`from_pretrained` or converted
            after quantization-aware training; adapters require ``merge_adapters``.
        path: the folder to write, new or existing.
        max_shard_size: maximum size per file, in bytes or as "5GB"; a tensor is never split.
        merge_adapters: add the adapters of :class:`MXLoRAExperts` and :class:`MXLoRALinear` to the written
            weights, as :func:`merge_adapter` does, one weight at a time. Linear layers are written unpacked,
            in the weight's logical dtype. The model itself is unchanged.

    Returns:
        The rounding error of each weight with merged adapters, by full name. **Small updates vanish in
        4 bits**: check :class:`MergeError` before serving the result. A warning lists the weights that lost
        their update.

    Raises:
        TypeError: the model is wrapped in another, such as PEFT's.
        NotImplementedError: the model has no experts that the layout supports.
        ValueError: tensors that the layout has no place for or that could not be loaded again, each named;
            adapters that overflow; ``max_shard_size`` is not a size, or ``path`` is a file; with
            ``merge_adapters``, a folder with an adapter; a generation config that transformers refuses.
        OSError: the folder is not writable, lacks space, or another save into it is under way.

    Example::

        model = from_pretrained("openai/gpt-oss-20b")
        save_pretrained(model, "gpt-oss-20b-tuned")
    """
    limit = bytes_of(max_shard_size)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}, not a transformers model as from_pretrained returns: take "
            f"it out of its wrapper, with unload() if that is PEFT's"
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
    """:func:`save_pretrained` with ``updates`` merged, and with other files copied from ``others``."""
    errors: dict[str, MergeError] = {}
    source = model_source(model, updates, errors)._replace(others=others)
    write(source, gpt_oss, path, limit)
    warn_of_lost(errors)
    return errors


def packed_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's ``state_dict`` with views of blocks and scales for packed weights; tied tensors once.

    Raises:
        NotImplementedError, ValueError: as :func:`save_pretrained`.
    """
    _, tensors = contents(model_source(model, {}, {}), gpt_oss)
    return dict(tensors)


def model_source(
    model: PreTrainedModel, updates: Mapping[str, Update], errors: dict[str, MergeError]
) -> Source:
    """A model as a source; with ``updates``, adapters are left out and each update is merged when read.

    Merging adds the rounding error of each weight to ``errors``.
    """
    for name in tied_names(model) & updates.keys():
        raise ValueError(
            f"{name}: has adapters, but model.config ties it to another tensor; set "
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
    """The adapters of this library, by their names in the model."""
    return {name: t for name, t in model.state_dict().items() if _is_adapter(model, name)}


def _is_adapter(model: PreTrainedModel, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    ours = isinstance(owner, (MXLoRALinear, MXLoRAExperts))
    return ours and name.endswith(("lora_A", "lora_B"))
