"""save_distributed: from a checkpoint of many ranks to gpt-oss's layout, a tensor at a time.

A checkpoint of ``torch.distributed.checkpoint`` lists its tensors by name and says in which files their parts
lie. One process draws them in the order of the layout, without the model and without the ranks that wrote
them, and holds one output file's tensors at most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from torchao_mx.formats import MXFP4
from torchao_mx.hf.config import skeleton_of
from torchao_mx.hf.layouts import gpt_oss
from torchao_mx.hf.publish import check_target
from torchao_mx.hf.write import Source, bytes_of, write
from torchao_mx.nn.experts.module import pack_singly
from torchao_mx.nn.ptq import MXWeightOnlyConfig


def save_distributed(
    checkpoint: str | Path,
    path: str | Path,
    config: Any,
    *,
    prefix: str = "",
    quantize: MXWeightOnlyConfig | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write what ``dcp.save`` wrote as a folder that stock transformers loads; see :func:`save_pretrained`.

    One process does it, whatever the number of ranks that saved; on any error ``path`` stays as it was.

    Args:
        checkpoint: a folder of ``torch.distributed.checkpoint`` with a gpt-oss model's ``state_dict``. Its
            ``.metadata`` is a pickle, as torch writes it: give folders that you trust.
        path: the folder to write, new or existing.
        config: the model's config, a ``GptOssConfig``.
        prefix: what names in the checkpoint begin with: "model." after ``dcp.save({"model": state, ...})``.
            Those that begin otherwise are left out.
        quantize: how to pack the experts' weights, one at a time, where the checkpoint has them in high
            precision: those of quantization-aware training. What ``step="convert"`` gives, bit for bit.
        max_shard_size: of a file, in bytes, or as "5GB"; a tensor is never split.

    Raises:
        NotImplementedError: a model with no experts that the layout is for.
        ValueError: tensors that are missing, misshapen, or that the layout has no place for (adapters:
            they are saved by :func:`save_adapter`), each named; an expert weight of another format, or of
            high precision without ``quantize``; a scale that is NaN, a weight of zeros; ``path`` a file.
        OSError: as :func:`save_pretrained`.

    Example::

        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id="step-100")     # on all ranks
        save_distributed("step-100", "gpt-oss-20b-tuned", model.config, prefix="model.")   # on one
    """
    limit = bytes_of(max_shard_size)
    if quantize is not None and not (
        isinstance(quantize, MXWeightOnlyConfig) and quantize.weight_spec.format == MXFP4
    ):
        raise ValueError(
            f"quantize={quantize!r}; the layout holds experts in {MXFP4.name}: give MXWeightOnlyConfig(), "
            f"with the scaling_mode of the training"
        )
    check_target(path)
    write(sharded_source(checkpoint, config, prefix, quantize), gpt_oss, path, limit)


def sharded_source(
    checkpoint: str | Path, config: Any, prefix: str, quantize: MXWeightOnlyConfig | None
) -> Source:
    """The tensors of a checkpoint, for the arguments of :func:`save_distributed`."""
    model = skeleton_of(AutoModelForCausalLM.from_config, config)
    weights = gpt_oss.packed_weights(model)
    tensors = {
        name: torch.empty(record.size, dtype=record.properties.dtype, device="meta")
        for name, record in _records(checkpoint, prefix).items()
    }

    def read(name: str) -> torch.Tensor:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        if name in weights and quantize is None:
            tensor = gpt_oss.empty(name, shape, dtype, "cpu")
        else:
            tensor = torch.empty(shape, dtype=dtype)
        try:
            dcp.load({prefix + name: tensor}, checkpoint_id=checkpoint, no_dist=True)
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise ValueError(
                f"{prefix}{name}: {cause}. Experts are read as {MXFP4.name} or, with quantize, in high "
                f"precision"
            ) from error
        if name in weights and quantize is not None:
            tensor = pack_singly(tensor, True, quantize.weight_spec)
        return tensor

    unpacked = (name for name in model.state_dict() if name in tensors and name not in weights)
    model = model.to(next((tensors[name].dtype for name in unpacked), None))
    what = f"{checkpoint} (names after {prefix!r})" if prefix else f"{checkpoint}"
    return Source(what, model, tensors, read)


def _records(checkpoint: str | Path, prefix: str) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and so on of each tensor, by its name without the prefix."""
    if not (Path(checkpoint) / ".metadata").is_file():
        raise ValueError(
            f"{checkpoint}: no .metadata is there, which torch.distributed.checkpoint writes last; give the "
            f"folder of a save that was finished"
        )
    found = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    records = {
        name.removeprefix(prefix): record
        for name, record in found.items()
        if name.startswith(prefix) and isinstance(record, TensorStorageMetadata)
    }
    if not records:
        raise ValueError(
            f"{checkpoint}: no name there begins with prefix={prefix!r}; give what those of the model begin "
            f"with, as {next(iter(found), 'nothing')} does"
        )
    return records
