"""save_distributed: from a checkpoint of many ranks to gpt-oss's layout, a tensor at a time.

A checkpoint of ``torch.distributed.checkpoint`` lists its tensors by name and says in which files their parts
lie. One process draws them in the order of the layout, without the model and without the ranks that wrote
them, and holds one output file's tensors at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchao_mx.formats import MXFP4
from torchao_mx.hf.checkpoint import raise_problems, value_problems
from torchao_mx.hf.layouts.gpt_oss import (
    BLOCKS,
    SCALES,
    block_shapes,
    packed_weights,
    skeleton_of,
    tied_names,
)
from torchao_mx.hf.save import _write_configs, bytes_of, check_target, replacing, write_tensors
from torchao_mx.hf.state import stored
from torchao_mx.nn.experts.module import pack
from torchao_mx.nn.ptq import MXWeightOnlyConfig
from torchao_mx.tensor import MXTensor


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
    _check_quantize(quantize)
    check_target(path)
    records = _records(checkpoint, prefix)
    skeleton = skeleton_of(AutoModelForCausalLM.from_config, config)
    weights = packed_weights(skeleton)
    if not weights:
        raise NotImplementedError(
            f"{type(skeleton).__name__} has no experts that MXFP4 checkpoints hold; those of gpt-oss are held"
        )
    names = _checked_names(records, skeleton, checkpoint, prefix)
    sizes = {}
    for name in names:
        record = records[name]
        if name in weights:
            sizes |= {
                name + k: torch.Size(s).numel() for k, s in block_shapes(record.size, name).items()
            }
        else:
            sizes[name] = record.size.numel() * record.properties.dtype.itemsize

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield from _drawn(checkpoint, prefix, name, records[name], name in weights, quantize)

    with replacing(path, sum(sizes.values())) as folder:
        unpacked = next(name for name in names if name not in weights)
        _write_configs(skeleton.to(records[unpacked].properties.dtype), folder)
        write_tensors(sizes, tensors(), folder, limit, "Saving")


def _check_quantize(quantize: Any) -> None:
    if quantize is None:
        return
    if not isinstance(quantize, MXWeightOnlyConfig) or quantize.weight_spec.format != MXFP4:
        raise ValueError(
            f"quantize={quantize!r}; the layout holds experts in {MXFP4.name}: give MXWeightOnlyConfig(), "
            f"with the scaling_mode of the training"
        )


def _records(checkpoint: str | Path, prefix: str) -> dict[str, TensorStorageMetadata]:
    """Shape, dtype and so on of each tensor, by its name without the prefix."""
    if not (Path(checkpoint) / ".metadata").is_file():
        raise ValueError(
            f"{checkpoint}: no .metadata is there, which torch.distributed.checkpoint writes last; give the "
            f"folder of a save that was finished"
        )
    found = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {
        name.removeprefix(prefix): record
        for name, record in found.items()
        if name.startswith(prefix) and isinstance(record, TensorStorageMetadata)
    }


def _checked_names(
    records: dict[str, TensorStorageMetadata],
    skeleton: PreTrainedModel,
    checkpoint: str | Path,
    prefix: str,
) -> list[str]:
    tied, wanted = tied_names(skeleton), skeleton.state_dict()
    names = [name for name in wanted if name not in tied]
    problems = []
    for name in names:
        if name not in records:
            others = "" if records else f"; no name there begins with prefix={prefix!r}"
            problems.append(f"{prefix}{name}: missing{others}")
        elif records[name].size != wanted[name].shape:
            problems.append(
                f"{prefix}{name}: has shape {tuple(records[name].size)} and config asks for "
                f"{tuple(wanted[name].shape)}; give the config that the model was made with"
            )
    for name in records.keys() - wanted.keys():
        problems.append(
            f"{prefix}{name}: {type(skeleton).__name__} has no such tensor; save adapters alone with "
            f"save_adapter, or merge them before saving"
        )
    if problems:
        raise_problems(problems, f"{checkpoint} cannot be saved in gpt-oss's layout")
    return names


def _drawn(
    checkpoint: str | Path,
    prefix: str,
    name: str,
    record: TensorStorageMetadata,
    packed: bool,
    quantize: MXWeightOnlyConfig | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a checkpoint of the layout has for one."""
    dtype = record.properties.dtype
    if not packed or quantize is not None:
        tensor = torch.empty(record.size, dtype=dtype)
    else:
        shapes = block_shapes(record.size, name)
        blocks, scales = (torch.empty(shapes[k], dtype=torch.uint8) for k in (BLOCKS, SCALES))
        tensor = MXTensor.from_blocks(blocks, scales, dtype).mT
    try:
        dcp.load({prefix + name: tensor}, checkpoint_id=checkpoint, no_dist=True)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(
            f"{prefix}{name}: {cause}. Experts are read as {MXFP4.name} or, with quantize, in high precision"
        ) from error
    if packed and quantize is not None:
        tensor = pack(tensor, True, quantize.weight_spec)
    parts = stored(name, tensor)
    if packed:
        blocks, scales = parts.values()
        problems = value_problems(name, lambda: blocks, scales)
        if problems:
            raise_problems(problems, f"{checkpoint} cannot be saved in gpt-oss's layout")
    yield from parts.items()
