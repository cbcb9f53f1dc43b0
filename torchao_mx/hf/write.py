"""Write checkpoints from any source in any layout, with the memory of one file.

A source (:class:`Source`) lists a model's tensors and reads each on demand: a model in memory (``save.py``),
a distributed checkpoint (``save_sharded.py``), or a folder of safetensors (``quantize.py``). A layout
(``layouts/``) says what a checkpoint stores for each tensor. :func:`write` combines the two::

    names -> sizes, which give the shards -> config.json, other files -> tensors, shard by shard -> the switch

Steps that may fail come before the tensors, which take longest. On any error the target stays unchanged
(``publish.py``).
"""

from __future__ import annotations

import copy
import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from torchao_mx.hf.config import skeleton_of, tied_names
from torchao_mx.hf.files import ADAPTER_CONFIG, CONFIG, INDEX, SINGLE, WEIGHTS_KEY
from torchao_mx.hf.layouts import Layout
from torchao_mx.hf.problems import raise_problems
from torchao_mx.hf.publish import replacing
from torchao_mx.hf.staging import save_tensors, write_json, writing
from torchao_mx.tensor import MXTensor

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Never copied: weights of any name and format, hidden files, and adapters, which would change the weights.
_NOT_COPIED = re.compile(
    rf"\..*|.*\.(safetensors|bin|pth?|ckpt|gguf|h5|msgpack|onnx|onnx_data)(\.index\.json)?|{ADAPTER_CONFIG}"
)


class Source(NamedTuple):
    """The content of a checkpoint, independent of its layout.

    Attributes:
        what: where the tensors come from, for messages.
        model: the model that the tensors belong to; it may be on ``meta``.
        tensors: by the model's names, with the shapes and dtypes that ``read`` returns: either on ``meta``,
            or the actual tensors, which are then checked before anything is written.
        read: returns the tensor of a name; called once per tensor in the model's order. A packed weight is an
            MXTensor ``[E, in, out]``.
        config: config.json, to be kept except for its quantization; if None, the model's.
        others: a checkpoint's folder whose other files, such as a tokenizer's, are copied.
    """

    what: str
    model: PreTrainedModel
    tensors: Mapping[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]
    config: dict[str, Any] | None = None
    others: Path | None = None


def write(
    source: Source, layout: Layout, path: str | Path, limit: int, title: str = "Saving"
) -> None:
    """Write ``source`` in ``layout`` into the folder ``path``, in files of up to ``limit`` bytes.

    On any error ``path`` stays unchanged. A larger tensor gets a file of its own.

    Raises:
        NotImplementedError, ValueError: as :func:`contents`; ``path`` cannot take a checkpoint.
        OSError: the folder is not writable, lacks space, or another save into it is under way.
    """
    sizes, tensors = contents(source, layout)
    with replacing(path, sum(sizes.values())) as folder:
        _write_configs(source, layout, folder)
        if source.others is not None:
            _copy_others(source.others, folder)
        _write_tensors(sizes, tensors, folder, limit, title)


def contents(
    source: Source, layout: Layout
) -> tuple[dict[str, int], Iterator[tuple[str, torch.Tensor]]]:
    """Return a checkpoint's sizes in bytes by name, and an iterator that reads its tensors in that order.

    Raises:
        NotImplementedError: the model has no weights that the layout packs.
        ValueError: one line per tensor that is missing, misshapen, or that the layout has no place for, and
            (now or when it is read) per packed weight that a loader would refuse.
    """
    model = skeleton_of(type(source.model), source.model.config)
    weights, wanted, tied = set(layout.packed_weights(model)), model.state_dict(), tied_names(model)
    kind, what = type(model).__name__, f"{source.what} cannot be saved in {layout.NAME}"
    if not weights:
        raise NotImplementedError(
            f"{what}: {kind} has no experts such as gpt-oss's, which the layout is for. Use the model's own "
            f"save_pretrained, or quantize it by from_pretrained with config=MXWeightOnlyConfig()"
        )
    problems = []
    for name, tensor in source.tensors.items():
        if name not in wanted:
            problems.append(
                f"{name}: {kind} has no such tensor; unload adapters of PEFT, merge adapters made by "
                f"quantize_ with save_pretrained(merge_adapters=True) or save them alone with save_adapter, "
                f"convert weights prepared for quantization-aware training"
            )
        elif tensor.shape != wanted[name].shape:
            problems.append(
                f"{name}: has shape {tuple(tensor.shape)}, but config asks for "
                f"{tuple(wanted[name].shape)}; give the config that the model was made with"
            )
        elif name in weights and not tensor.is_meta:
            problems += layout.weight_problems(name, tensor)
    names = [name for name in wanted if name not in tied]
    problems += [
        f"{name}: missing; save the whole model" for name in names if name not in source.tensors
    ]
    raise_problems(problems, what)
    sizes: dict[str, int] = {}
    for name in names:
        shape, dtype = source.tensors[name].shape, source.tensors[name].dtype
        if name in weights:
            empty = layout.empty(name, shape, dtype)
        else:
            empty = torch.empty(shape, dtype=dtype, device="meta")
        sizes |= {key: part.nbytes for key, part in layout.stored(name, empty).items()}

    def parts(name: str) -> Iterable[tuple[str, torch.Tensor]]:
        tensor = source.read(name)
        if name in weights:
            raise_problems(layout.weight_problems(name, tensor), what)
        elif isinstance(tensor, MXTensor):
            tensor = tensor.dequantize()
        return layout.stored(name, tensor).items()

    return sizes, (part for name in names for part in parts(name))


def bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size).upper())
    limit = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if isinstance(size, bool) or limit <= 0:
        raise ValueError(f"max_shard_size={size!r} is not a size; give bytes, or text like '5GB'")
    return limit


def _write_tensors(
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    limit: int,
    title: str,
) -> None:
    """Write ``tensors``, which have the names, order and bytes of ``sizes``; read one shard at a time."""
    shards, total, stream = _shards(sizes, limit), sum(sizes.values()), iter(tensors)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as progress:
        for file, names in shards.items():
            held = {}
            for key, tensor in itertools.islice(stream, len(names)):
                # No copy if it is already contiguous and on the CPU.
                held[key] = tensor.to("cpu").contiguous()
                progress.update(tensor.nbytes)
            save_tensors(held, folder / file, {"format": "pt"})
    if len(shards) > 1:
        places = {key: file for file, names in shards.items() for key in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(index, folder / INDEX)


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """The names of each file's tensors, in order; a file that would exceed ``limit`` bytes is split."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    file = f"model-{{:05d}}-of-{len(shards):05d}.safetensors"
    return {file.format(i): names for i, names in enumerate(shards, 1)}


def _write_configs(source: Source, layout: Layout, folder: Path) -> None:
    model = source.model
    quantization = layout.quantization_config(getattr(model.config, "quantization_config", None))
    if source.config is not None:
        record = source.config | {"quantization_config": quantization}
        record.pop(WEIGHTS_KEY, None)  # it names the source's files
        write_json(record, folder / CONFIG)
        return
    config: Any = copy.deepcopy(model.config)
    config.quantization_config = quantization
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    with writing(folder / CONFIG):
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _copy_others(source: Path, folder: Path) -> None:
    """Copy a checkpoint's other files, such as a tokenizer's, unless ``folder`` has them."""
    for file in source.iterdir():
        copied = folder / file.name
        if file.is_file() and not copied.exists() and not _NOT_COPIED.fullmatch(file.name):
            size = file.stat().st_size
            with file.open("rb") as stream, writing(copied, size), copied.open("wb") as out:
                shutil.copyfileobj(stream, out)
