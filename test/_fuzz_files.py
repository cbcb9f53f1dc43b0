"""Folders of files in memory, and what can happen to them before a user loads them.

A folder is ``{name: bytes}``; the place of the bytes may be taken by a :class:`Special`. A mutation is a tuple of
literals, ``(name, *arguments)``, so that a failing case can be printed, pasted and run again; :data:`MUTATIONS`
has the functions. One that no longer applies, after another has removed its file say, changes nothing.
"""

import json
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
OUTSIDE = "outside.safetensors"  # a file beside the folder, which nothing in it may reach


class Special(NamedTuple):
    """What stands in the place of a file: "dir", "fifo", "link" to ``arg`` or a file "locked" to its readers."""

    kind: str
    arg: bytes | str = b""


def write(files, folder):
    """The folder ``folder`` of ``files``; whether some of it can only be tested without privileges."""
    folder.mkdir()
    locked = False
    for name, content in files.items():
        path = folder / name
        if not isinstance(content, Special):
            path.write_bytes(content)
        elif content.kind == "dir":
            path.mkdir()
        elif content.kind == "fifo":
            os.mkfifo(path)
        elif content.kind == "link":
            path.symlink_to(content.arg)
        else:
            path.write_bytes(content.arg)
            path.chmod(0)
            locked = True
    return locked


def read(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


# --- safetensors, without a check --------------------------------------------------------------------


def split(content):
    """(the header's object, the data), or None of what is no safetensors file."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        return (header, content[8 + length :]) if isinstance(header, dict) else None
    except (ValueError, TypeError, struct.error, RecursionError, OverflowError):
        return None


def join(header, data):
    text = header if isinstance(header, bytes) else dumps(header)
    return struct.pack("<Q", len(text)) + text + data


def dumps(document):
    """JSON, in which some strings stand for what Python's encoder does not write."""
    text = json.dumps(document)
    for token, spelled in {
        "@nan": "NaN", "@inf": "Infinity", "@float": "1e400", "@digits": "9" * 5000,
        "@deep": "[" * 20000 + "]" * 20000,
    }.items():  # fmt: skip
        text = text.replace(f'"{token}"', spelled)
    return text.encode()


def tensors_in(content):
    """``{name: (dtype, shape, bytes)}`` of an undamaged file, else None."""
    parts = split(content)
    try:
        header, data = parts
        header.pop("__metadata__", None)
        return {
            n: (r["dtype"], r["shape"], data[slice(*r["data_offsets"])]) for n, r in header.items()
        }
    except (TypeError, KeyError, AttributeError):
        return None


def packed(tensors, metadata=None):
    """A file of :func:`tensors_in`'s."""
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += content
    return join(header, data)


def sharded(files, count=3):
    """A folder of a single file as one of ``count`` shards, which share out what belongs together."""
    tensors = tensors_in(files[SINGLE])
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    places = {name: names[i % count] for i, name in enumerate(tensors)}
    shards = {f: packed({n: t for n, t in tensors.items() if places[n] == f}) for f in names}
    size = sum(len(content) for *_, content in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    rest = {name: content for name, content in files.items() if name != SINGLE}
    return rest | shards | {INDEX: json.dumps(index).encode()}


# --- mutations ---------------------------------------------------------------------------------------

MUTATIONS = {}


def mutation(function):
    MUTATIONS[function.__name__] = function
    return function


def mutated(files, mutations):
    files = dict(files)
    for name, *arguments in mutations:
        MUTATIONS[name](files, *arguments)
    return files


def _bytes(files, file):
    content = files.get(file)
    return content if isinstance(content, bytes) else b""


@mutation
def flip(files, file, at, mask):
    if content := bytearray(_bytes(files, file)):
        content[at % len(content)] ^= mask
        files[file] = bytes(content)


@mutation
def flip_header(files, file, at, mask):
    """Within a safetensors file's length and header, of which there are few bytes among many."""
    content = _bytes(files, file)
    if parts := split(content):
        flip(files, file, at % (len(content) - len(parts[1])), mask)


@mutation
def cut(files, file, keep):
    if content := _bytes(files, file):
        files[file] = content[: keep % len(content)]


@mutation
def splice(files, file, at, n, new):
    if content := _bytes(files, file):
        at %= len(content) + 1
        files[file] = content[:at] + new + content[at + n :]


@mutation
def length(files, file, value):
    """What a file says of its header's length."""
    if content := _bytes(files, file):
        files[file] = struct.pack("<Q", value % 2**64) + content[8:]


@mutation
def header(files, file, text):
    if parts := split(_bytes(files, file)):
        files[file] = join(text, parts[1])


@mutation
def wrapped(files, file, before, after):
    """The header's text with something around it."""
    if parts := split(_bytes(files, file)):
        files[file] = join(before + dumps(parts[0]) + after, parts[1])


@mutation
def metadata(files, file, value):
    if parts := split(_bytes(files, file)):
        files[file] = join({**parts[0], "__metadata__": value}, parts[1])


def _edit(files, file, tensor, change):
    parts = split(_bytes(files, file))
    if parts and isinstance(parts[0].get(tensor), dict):
        try:
            change(parts[0])
        except (KeyError, TypeError, IndexError, ValueError):
            return
        files[file] = join(*parts)


@mutation
def field(files, file, tensor, key, value):
    """A field of a tensor's record; None with the key removed is what "@gone" does."""

    def change(header):
        header[tensor][key] = value
        if value == "@gone":
            del header[tensor][key]

    _edit(files, file, tensor, change)


@mutation
def shift(files, file, tensor, begin, end):
    def change(header):
        offsets = header[tensor]["data_offsets"]
        header[tensor]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    _edit(files, file, tensor, change)


@mutation
def exchange(files, file, tensor, other):
    """Two tensors' places in the data."""

    def change(header):
        records = header[tensor], header[other]
        offsets = [record["data_offsets"] for record in records]
        records[0]["data_offsets"], records[1]["data_offsets"] = reversed(offsets)

    _edit(files, file, tensor, change)


@mutation
def forget(files, file, tensor):
    """A tensor gone from the header, whose data stay: a hole."""
    _edit(files, file, tensor, lambda header: header.pop(tensor))


@mutation
def rename(files, file, tensor, new):
    _edit(files, file, tensor, lambda header: header.update({new: header.pop(tensor)}))


@mutation
def alias(files, file, tensor, new):
    """A second name for the same bytes."""
    _edit(files, file, tensor, lambda header: header.setdefault(new, dict(header[tensor])))


@mutation
def twice(files, file, tensor, other):
    """The header has ``tensor`` twice, the second time with the record of ``other``."""
    parts = split(_bytes(files, file))
    if parts and tensor in parts[0] and other in parts[0]:
        text = dumps(parts[0])[:-1] + b", " + dumps({tensor: parts[0][other]})[1:]
        files[file] = join(text, parts[1])


def _change(files, file, change):
    """Of a file's tensors, which stays undamaged in itself."""
    tensors = tensors_in(_bytes(files, file))
    if tensors is not None:
        header, _ = split(files[file])
        change(tensors)
        files[file] = packed(tensors, header.get("__metadata__"))


def value_of(record):
    dtype, shape, content = record
    if not content:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).view(shape)


def record_of(dtype, tensor):
    return (
        dtype,
        list(tensor.shape),
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
    )


@mutation
def drop(files, file, tensor):
    _change(files, file, lambda tensors: tensors.pop(tensor, None))


@mutation
def retype(files, file, tensor, dtype):
    """The same values, as near as they come, in another dtype."""

    def change(tensors):
        if tensor in tensors:
            tensors[tensor] = record_of(dtype, value_of(tensors[tensor]).float().to(DTYPES[dtype]))

    _change(files, file, change)


RESIZES = {
    "half": lambda t: t[: len(t) // 2],
    "double": lambda t: torch.cat([t, t]),
    "none": lambda t: t[:0],
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.mT if t.dim() > 1 else t[None],
    "deeper": lambda t: t[None],
    "scalar": lambda t: t.flatten()[0],
    "halved last": lambda t: t[..., : t.shape[-1] // 2],
}


@mutation
def resize(files, file, tensor, how):
    def change(tensors):
        if tensor in tensors:
            value = value_of(tensors[tensor])
            if value.dim() and value.numel():
                tensors[tensor] = record_of(tensors[tensor][0], RESIZES[how](value))

    _change(files, file, change)


@mutation
def poke(files, file, tensor, at, new):
    """Some of a tensor's bytes."""

    def change(tensors):
        if tensor in tensors:
            dtype, shape, content = tensors[tensor]
            at_ = at % len(content) if content else 0
            tensors[tensor] = (
                dtype,
                shape,
                (content[:at_] + new + content[at_ + len(new) :])[: len(content)],
            )

    _change(files, file, change)


@mutation
def fill(files, file, tensor, byte):
    def change(tensors):
        if tensor in tensors:
            dtype, shape, content = tensors[tensor]
            tensors[tensor] = dtype, shape, bytes([byte]) * len(content)

    _change(files, file, change)


@mutation
def move(files, file, tensor, other):
    """A tensor to another shard; the index is left as it was."""
    there = tensors_in(_bytes(files, other))
    here = tensors_in(_bytes(files, file))
    if there is not None and here and tensor in here:
        there[tensor] = here[tensor]
        files[other] = packed(there)
        drop(files, file, tensor)


def _json(files, file):
    try:
        return json.loads(_bytes(files, file))
    except (ValueError, RecursionError):
        return None


def _holder(document, path):
    """What contains the last step of ``path``, or None."""
    try:
        for step in path[:-1]:
            document = document[step]
        return document if path and isinstance(document, (dict, list)) else None
    except (KeyError, IndexError, TypeError):
        return None


@mutation
def put(files, file, path, value):
    document = _json(files, file)
    holder = _holder(document, path)
    if holder is not None:
        try:
            holder[path[-1]] = value
        except (IndexError, TypeError):
            return
        files[file] = dumps(document)


@mutation
def remove(files, file, path):
    document = _json(files, file)
    holder = _holder(document, path)
    if isinstance(holder, dict):
        holder.pop(path[-1], None)
        files[file] = dumps(document)


TEXTS = {
    "empty": lambda old: b"",
    "BOM": lambda old: b"\xef\xbb\xbf" + old,
    "UTF-16": lambda old: old.decode("latin1").encode("utf-16"),
    "latin": lambda old: old[:1] + b'"\xe9\xff": 1, ' + old[1:],
    "NUL": lambda old: old + b"\x00",
    "null": lambda old: b"null",
    "list": lambda old: b"[]",
    "object": lambda old: b"{}",
    "number": lambda old: b"1e999",
    "string": lambda old: b'"text"',
    "deep": lambda old: b"[" * 100_000,
    "deep object": lambda old: b'{"a":' * 100_000,
    "digits": lambda old: b'{"a": ' + b"9" * 5000 + b"}",
    "surrogate": lambda old: old[:1] + b'"\\ud800": 1, ' + old[1:],
    "binary": lambda old: bytes(range(256)),
    "twice": lambda old: old + old,
}


@mutation
def text(files, file, which):
    if isinstance(files.get(file), bytes):
        files[file] = TEXTS[which](files[file])


@mutation
def delete(files, file):
    files.pop(file, None)


@mutation
def special(files, file, kind, arg=b""):
    if file in files:
        arg = _bytes(files, file) if kind == "locked" else arg
        files[file] = Special(kind, arg)


@mutation
def linked(files, file):
    """The file under another name and a link in its place, as in the Hub's cache."""
    if file in files:
        files[f"blob-{file}"] = files[file]
        files[file] = Special("link", f"blob-{file}")


@mutation
def swap(files, file, other):
    if file in files and other in files:
        files[file], files[other] = files[other], files[file]


@mutation
def copy(files, file, other):
    if file in files:
        files[other] = files[file]


@mutation
def both_layouts(files, change):
    """Beside a single file an index and shards, or beside these a single file; changed unless None."""
    if isinstance(files.get(SINGLE), bytes) and INDEX not in files and tensors_in(files[SINGLE]):
        other = sharded(files)
    else:
        tensors = {}
        for name, content in sorted(files.items()):
            if name.endswith(".safetensors") and isinstance(content, bytes):
                tensors |= tensors_in(content) or {}
        other = {SINGLE: packed(tensors)}
    new = {name: content for name, content in other.items() if name not in files}
    if change is not None:
        kind, tensor, *arguments = change
        for name in [n for n in new if n.endswith(".safetensors")]:
            MUTATIONS[kind](new, name, tensor, *arguments)
    files.update(new)


@mutation
def nested(files, file, key, value):
    """A JSON object's key at the top, whatever is there."""
    document = _json(files, file)
    if isinstance(document, dict):
        document[key] = value
        files[file] = dumps(document)


@mutation
def put_record(files, file, tensor, value):
    """Anything in the place of a tensor's record."""
    if parts := split(_bytes(files, file)):
        files[file] = join({**parts[0], tensor: value}, parts[1])


@mutation
def add(files, file, content):
    files.setdefault(file, content)
