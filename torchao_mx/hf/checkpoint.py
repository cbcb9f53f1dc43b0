"""Check all of a checkpoint's safetensors files before a model is built.

Headers give names, shapes, dtypes and the end of each tensor, so a truncated file is found without reading
its data. The only data read are the scales, a seventeenth of the packed bytes, and the blocks of a weight
whose scales are all zero.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from torchao_mx.hf.config import has_owner, tied_names
from torchao_mx.hf.files import (
    CONFIG,
    INDEX,
    SINGLE,
    WEIGHTS_KEY,
    Entry,
    read_header,
    read_json,
    read_tensor,
    same_bytes,
)
from torchao_mx.hf.layouts.gpt_oss import (
    BLOCKS,
    SCALES,
    block_shapes,
    packed_weights,
    value_problems,
)
from torchao_mx.hf.problems import misshapen, missing, mistyped, raise_problems, unplaced

FLOATS = ("BF16", "F16", "F32")
_FILE = re.compile(r"[^/\\\0]+\.safetensors")


def read_folder(folder: Path) -> dict[str, Entry]:
    """Return every tensor of the checkpoint in ``folder``, from the files that transformers reads.

    These are the file that ``transformers_weights`` in ``config.json`` names, else ``model.safetensors``,
    else the shards of the index. If both ``model.safetensors`` and an index exist, their tensors must agree
    in every byte: one of them was written later, and transformers might read the other.

    Raises:
        OSError: a file cannot be opened.
        ValueError: no weights; a missing or damaged shard; an index that contradicts its shards; a single
            file and shards that differ.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a checkpoint's folder")
    named = _named_weights(folder / CONFIG)
    if named is not None:
        read = _read_shards if named.suffix == ".json" else read_header
        return read(named)
    single, index = folder / SINGLE, folder / INDEX
    if not single.exists() and not index.exists():
        raise ValueError(
            f"{folder}: contains neither {SINGLE} nor {INDEX}; give a folder with the weights as safetensors "
            f"(other formats are not read)"
        )
    sharded = _read_shards(index) if index.exists() else {}
    if not single.exists():
        return sharded
    entries = read_header(single)
    if index.exists():
        _check_agreement(single, index, entries, sharded)
    return entries


def _named_weights(config: Path) -> Path | None:
    """The file that ``transformers_weights`` names, which transformers reads before any other."""
    name = read_json(config).get(WEIGHTS_KEY) if config.exists() else None
    if name is None:
        return None
    if not isinstance(name, str) or not _FILE.fullmatch(name.removesuffix(".index.json")):
        raise ValueError(
            f"{config}: {WEIGHTS_KEY}={name!r} must name a *.safetensors file, or an index of such files, in "
            f"the same folder: remove it, or correct it"
        )
    return config.with_name(name)


def _read_shards(index: Path) -> dict[str, Entry]:
    places = _weight_map(index)
    entries: dict[str, Entry] = {}
    for file in sorted(set(places.values())):
        path = index.with_name(file)
        if not path.exists():
            raise ValueError(
                f"{path}: the index lists this file, but it is missing; download it again"
            )
        for name, entry in read_header(path).items():
            if places.get(name) != file:
                raise ValueError(
                    f"{name}: in {file}, but {index} places it in {places.get(name)}; the files are from "
                    f"different checkpoints: download all of them again"
                )
            entries[name] = entry
    lost = sorted(places.keys() - entries.keys())
    if lost:
        raise ValueError(
            f"{lost[0]}: {index} places it in {places[lost[0]]}, which does not contain it ({len(lost)} such "
            f"tensors); download that file again"
        )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as a name in the index's own folder."""
    record = read_json(index)
    places = record.get("weight_map")
    if not isinstance(places, dict) or not isinstance(record.get("metadata"), dict) or not places:
        raise ValueError(
            f"{index}: not an index of shards, which has metadata and a weight_map from tensors to files; "
            f"download it again"
        )
    for name, file in places.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise ValueError(
                f"{name}: {index} places it in {file!r}; a shard is given by its name, that of a "
                f"*.safetensors file in the index's own folder: download the index again"
            )
    return places


def _check_agreement(
    single: Path, index: Path, entries: dict[str, Entry], sharded: dict[str, Entry]
) -> None:
    different = sorted(entries.keys() ^ sharded.keys()) or [
        name for name, entry in entries.items() if not same_bytes(entry, sharded[name])
    ]
    if different:
        raise ValueError(
            f"{different[0]}: differs between {single} and the shards of {index} ({len(different)} such "
            f"tensors); transformers would read the former: remove whichever is out of date"
        )


def check_checkpoint(entries: dict[str, Entry], skeleton: PreTrainedModel, folder: Path) -> None:
    """Refuse a checkpoint that cannot fill all of ``skeleton``, a gpt-oss model on ``meta``.

    Raises:
        NotImplementedError: the model has no experts of a known class.
        ValueError: one line per tensor that is missing, unknown, misshapen, of another dtype or without its
            partner; if there is none, one per weight that has NaN scales or is all zeros.
    """
    weights = packed_weights(skeleton)
    if not weights:
        raise NotImplementedError(
            f"{folder / CONFIG}: {type(skeleton).__name__} has no experts that can be read from MXFP4; only "
            f"gpt-oss has. For another architecture load a bf16 checkpoint with config=MXWeightOnlyConfig()"
        )
    problems = header_problems(entries, skeleton, weights)
    if not problems:
        for weight in tqdm(weights, desc="Checking scales", disable=None):
            scales = read_tensor(entries, weight + SCALES)
            blocks = functools.partial(read_tensor, entries, weight + BLOCKS)
            problems += value_problems(weight, blocks, scales)
    raise_problems(problems, f"{folder} cannot be loaded")


def header_problems(
    entries: dict[str, Entry], skeleton: PreTrainedModel, weights: list[str]
) -> list[str]:
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    tied = tied_names(skeleton)
    for name, tensor in skeleton.state_dict().items():
        if name in weights:
            for suffix, shape in block_shapes(tensor.shape, name).items():
                wanted[name + suffix] = (("U8",), shape)
        elif name not in tied:
            wanted[name] = (FLOATS, tuple(tensor.shape))
    problems = []
    for name, (dtypes, shape) in wanted.items():
        entry = entries.get(name)
        if entry is None:
            problems.append(_missing(name, entries))
        elif entry.shape != shape:
            problems.append(misshapen(name, entry.shape, shape))
        elif entry.dtype not in dtypes:
            problems.append(mistyped(name, entry.dtype, dtypes))
    problems += tied_problems(entries, skeleton).values()
    for name in sorted(entries.keys() - wanted.keys() - tied):
        if has_owner(skeleton, name) or name.endswith((BLOCKS, SCALES)):
            problems.append(unplaced(name))
    return problems


def tied_problems(entries: dict[str, Entry], skeleton: PreTrainedModel) -> dict[str, str]:
    """One line per tensor that ``config.json`` ties to the embedding but whose stored value differs.

    transformers 4 would drop that value; transformers 5 would keep it and not tie.
    """
    embedding = skeleton.get_input_embeddings()
    source = next((f"{n}.weight" for n, m in skeleton.named_modules() if m is embedding), None)
    if source not in entries:
        return {}
    return {
        name: f"{name}: differs from {source}, but tie_word_embeddings in config.json says that they are "
        f"one; set it to false there, or remove the tensor"
        for name in sorted(tied_names(skeleton) & entries.keys())
        if entries[name].shape == entries[source].shape
        and not same_bytes(entries[name], entries[source])
    }


def _missing(name: str, entries: dict[str, Entry]) -> str:
    """The line for a missing tensor; it names a related tensor that is present."""
    for suffix, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        stem = name.removesuffix(suffix)
        if stem != name and stem in entries:
            return f"{name}: missing, but {stem} is there unpacked; export it as blocks and scales"
        if stem != name and stem + other in entries:
            return f"{name}: missing, but {stem + other} is there: download both again, they belong together"
    return missing(name)
