"""Read JSON and safetensors files that may be damaged or malicious.

Only regular files are read (a pipe would block), every field is checked before use, and every failure is a
``ValueError`` or ``OSError`` that names the file. Links are followed, since the Hub's cache consists of them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# File names of transformers and PEFT.
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A key that both versions of transformers know in config.json: the weight file to load instead of SINGLE or
# INDEX. They drop it when they save a config.
WEIGHTS_KEY = "transformers_weights"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
AGAIN = "download or save it again"
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
_METADATA = "__metadata__"
_JSON_BYTES = 100_000_000  # safetensors' own limit for a header; the largest indexes use a tenth
_JSON_DEPTH = 64
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor as described by its file's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    def empty(self) -> torch.Tensor:
        """A tensor of this dtype and shape on ``meta``."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


@contextlib.contextmanager
def reading(file: Path, remedy: str = AGAIN) -> Iterator[None]:
    """Make reading errors name ``file``: an ``OSError`` keeps its class, others become ``ValueError``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{file}: cannot be read ({reason}); {remedy}") from error
    except (SafetensorError, RecursionError, UnicodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {remedy}") from error


def check_regular(file: Path) -> None:
    """Refuse a path that is not a regular file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is a folder, a pipe or a device.
    """
    with reading(file):
        file.stat()
    if not file.is_file():
        raise ValueError(f"{file}: a folder, a pipe or a device, not a regular file; {AGAIN}")


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in ``file``.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a regular file, UTF-8 text or a JSON object, is too large or too deeply nested,
            contains NaN, or has one key with different values.
    """
    check_regular(file)
    with reading(file):
        with file.open("rb") as stream:
            text = stream.read(_JSON_BYTES + 1)
        return _json_object(text, file)


def _json_object(text: bytes, file: Path) -> dict[str, Any]:
    if len(text) > _JSON_BYTES:
        raise ValueError(f"{file}: over {_JSON_BYTES:,} bytes of JSON; {AGAIN}")
    try:
        record = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}: a JSON {type(record).__name__}, not a JSON object; {AGAIN}")
    level: list[Any] = [record]
    for _ in range(_JSON_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return record
    raise ValueError(f"{file}: JSON nested more than {_JSON_DEPTH} levels deep; {AGAIN}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        for key, value in pairs:
            if record[key] != value:
                raise ValueError(f"{key!r} appears twice, with different values")
    return record


def _constant(text: str) -> float:
    """Accept infinities, which transformers 4 wrote into configs as limits; refuse NaN."""
    if text == "NaN":
        raise ValueError("a NaN")
    return float(text)


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file; their dtypes are known and they fill the file exactly.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is cut short or not a safetensors file, or its header contradicts itself or the file's
            size; the message names the tensor.
    """
    header, start, size = _header(file)
    header.pop(_METADATA, None)
    entries = {name: _entry(file, name, record, start) for name, record in header.items()}
    _check_spans(file, entries, start, size)
    return entries


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        OSError, ValueError: as :func:`read_header`.
    """
    header, _, _ = _header(file)
    return header.get(_METADATA) or {}


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The raw header, with its metadata checked; the offset of the data; the file's size."""
    check_regular(file)
    with reading(file), file.open("rb") as stream:
        size = file.stat().st_size
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if not 0 < length <= size - _LENGTH_BYTES:
            raise ValueError(
                f"{file}: {size} bytes, cut short within its header or not a safetensors file; {AGAIN}"
            )
        if length > _JSON_BYTES:
            raise ValueError(
                f"{file}: a header of {length:,} bytes, above safetensors' limit; {AGAIN}"
            )
        header = _json_object(stream.read(length), file)
    metadata = header.get(_METADATA) or {}
    if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
        raise ValueError(f"{file}: {_METADATA} in its header has non-string values; {AGAIN}")
    return header, _LENGTH_BYTES + length, size


def _entry(file: Path, name: str, record: Any, start: int) -> Entry:
    with reading(file):
        name.encode()  # fails for half a surrogate pair, which cannot be printed
    try:
        dtype, shape, (begin, end) = (record[k] for k in ("dtype", "shape", "data_offsets"))
        numbers = [*shape, begin, end]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a number is not a count")
        if not isinstance(shape, list):
            raise TypeError("a shape is a list")
        itemsize = DTYPES[dtype].itemsize
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}: its record in the header of {file} cannot be read: {_short(record)}; it needs a "
            f"safetensors dtype, a shape and two data_offsets: {AGAIN}"
        ) from error
    if begin > end or math.prod(shape) * itemsize != end - begin:
        raise ValueError(
            f"{name}: shape {tuple(shape)} in {dtype} takes {math.prod(shape) * itemsize} bytes, but the "
            f"header of {file} places it at [{begin}, {end}); {AGAIN}"
        )
    return Entry(file, dtype, tuple(shape), start + begin, start + end)


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _check_spans(file: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Refuse tensors that overlap, leave gaps, or do not end where the file ends."""
    spans = sorted((entry.begin, entry.end, name) for name, entry in entries.items())
    if spans and spans[-1][1] > size:
        _, end, name = spans[-1]
        raise ValueError(
            f"{name}: ends at byte {end} of {file}, which has {size}: the file is cut short, {AGAIN}"
        )
    position = start
    for begin, end, name in spans:
        if begin != position:
            what = (
                "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            )
            raise ValueError(f"{name}: begins at byte {begin} of {file} and {what}; {AGAIN}")
        position = end
    if position != size:
        raise ValueError(
            f"{file}: {size - position} bytes after its last tensor belong to no tensor; {AGAIN}"
        )


def read_tensor(entries: dict[str, Entry], name: str) -> torch.Tensor:
    """Read the tensor ``name`` into CPU memory."""
    file = entries[name].file
    with reading(file, f"{name} is in it: {AGAIN}"), safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Check a file's header and read all its tensors into CPU memory."""
    names = read_header(file)
    with reading(file), safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names}


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if one == other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_chunks(one), _chunks(other), strict=True))


def _chunks(entry: Entry) -> Iterator[bytes]:
    with reading(entry.file), entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        for position in range(entry.begin, entry.end, _CHUNK):
            yield stream.read(min(_CHUNK, entry.end - position))
