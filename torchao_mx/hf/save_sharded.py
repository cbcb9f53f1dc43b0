"""save_distributed: convert a checkpoint of many ranks to gpt-oss's layout, one tensor at a time.

A ``torch.distributed.checkpoint`` lists its tensors by name and the files that hold their parts. One process
reads them in the order of the layout, without the model or the ranks that wrote them, and holds the tensors
of at most one output file.
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
    """Convert a ``dcp.save`` checkpoint to one that stock transformers loads; see :func:`save_pretrained`.

    One process suffices, however many ranks saved; on any error ``path`` is unchanged.

    Args:
        checkpoint: a folder of ``torch.distributed.checkpoint`` with a gpt-oss model's ``state_dict``. Its
            ``.metadata`` is a pickle, as torch writes it: pass only folders that you trust.
        path: the folder to write, new or existing.
        config: the model's config, a ``GptOssConfig``.
        prefix: the prefix of the model's names: "model." after ``dcp.save({"model": state, ...})``. Tensors
            without the prefix are left out.
        quantize: how to pack expert weights that the checkpoint has in high precision, from
            quantization-aware training; one at a time, and bit for bit as ``step="convert"`` does.
        max_shard_size: maximum size per file, in bytes or as "5GB"; a tensor is never split.

    Raises:
        NotImplementedError: the model has no experts that the layout supports.
        ValueError: tensors that are missing, misshapen, or that the layout has no place for, each named (use
            :func:`save_adapter` for adapters); an expert weight in another format, or in high precision
            without ``quantize``; NaN scales; a weight that is all zeros; ``path`` is a file.
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
            f"with the scaling_mode used in training"
        )
    check_target(path)
    write(sharded_source(checkpoint, config, prefix, quantize), gpt_oss, path, limit)


def sharded_source(
    checkpoint: str | Path, config: Any, prefix: str, quantize: MXWeightOnlyConfig | None
) -> Source:
    """A distributed checkpoint as a source; the arguments are those of :func:`save_distributed`."""
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
                f"{prefix}{name}: {cause}. Experts are read in {MXFP4.name} or, with quantize, in high "
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
    """The metadata (shape, dtype and so on) of each tensor, by its name without the prefix."""
    if not (Path(checkpoint) / ".metadata").is_file():
        raise ValueError(
            f"{checkpoint}: has no .metadata, which torch.distributed.checkpoint writes last; give the "
            f"folder of a finished save"
        )
    found = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    records = {
        name.removeprefix(prefix): record
        for name, record in found.items()
        if name.startswith(prefix) and isinstance(record, TensorStorageMetadata)
    }
    if not records:
        raise ValueError(
            f"{checkpoint}: no name begins with prefix={prefix!r}, the first is "
            f"{next(iter(found), 'missing')}; give the prefix of the model's names"
        )
    return records
