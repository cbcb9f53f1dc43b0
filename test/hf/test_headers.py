"""Files that are damaged or made up: refused by name before anything is built, whatever is wrong with them.

The oracle for headers is safetensors' own reader.
"""

import json
import os
import random
import signal
import struct

import pytest
import torch

pytest.importorskip("transformers")
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_load import config_of, tensors_of, write

from torchao_mx.hf import from_pretrained, load_adapter
from torchao_mx.hf.checkpoint import read_folder

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
NAME = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.fixture(scope="module")
def tensors():
    return tensors_of(config_of())


@pytest.fixture
def folder(tmp_path, tensors):
    return write(tmp_path / "model", config_of(), tensors)


@pytest.fixture
def sharded(tmp_path, tensors):
    return write(tmp_path / "sharded", config_of(), tensors, 3)


def refused(folder, *parts, **options):
    """A ValueError that has all of ``parts``, a file or tensor and a remedy among them."""
    with pytest.raises(ValueError) as info:  # noqa: PT011  parts follow
        from_pretrained(folder, **options)
    text = str(info.value)
    assert type(info.value) is ValueError and ("again" in text or "remove" in text), text
    for part in parts:
        assert part in text, text


# --- headers --------------------------------------------------------------------------------------


def parts_of(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(file, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def span(change):
    """``change(begin, end)`` of one tensor's place."""
    return lambda record: record.update(data_offsets=change(*record["data_offsets"]))


RECORDS = {
    "a hole": span(lambda b, e: [b + 1, e + 1]),
    "overlap": span(lambda b, e: [b - 1, e - 1]),
    "reversed": span(lambda b, e: [e, b]),
    "negative": span(lambda b, e: [b - e, 0]),
    "one offset": span(lambda b, e: [b]),
    "three offsets": span(lambda b, e: [b, e, e]),
    "text offsets": span(lambda b, e: "bb"),
    "fractions": span(lambda b, e: [float(b), float(e)]),
    "beyond": span(lambda b, e: [b, e + 10**30]),
    "more rows": lambda record: record["shape"].append(2),
    "huge shape": lambda record: record.update(shape=[10**30]),
    "bools": lambda record: record.update(shape=[True, *record["shape"]]),
    "negative shape": lambda record: record.update(shape=[-1, -1, *record["shape"]]),
    "shape as text": lambda record: record.update(shape="12"),
    "no shape": lambda record: record.pop("shape"),
    "wider dtype": lambda record: record.update(dtype="F32"),
    "unknown dtype": lambda record: record.update(dtype="U7"),
    "dtype of another type": lambda record: record.update(dtype=["U8"]),
    "no dtype": lambda record: record.pop("dtype"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_records(case, folder):
    header, data = parts_of(folder / FILE)
    RECORDS[case](header[NAME])
    put(folder / FILE, header, data)
    refused(folder, NAME if case not in ("a hole", "overlap") else "model.", str(folder / FILE))


def test_records_that_are_none(folder):
    header, data = parts_of(folder / FILE)
    for record in (None, [], 1, "U8"):
        put(folder / FILE, header | {NAME: record}, data)
        refused(folder, NAME, str(folder / FILE))


def test_headers(folder):
    header, data = parts_of(folder / FILE)
    text = json.dumps(header).encode()
    file = str(folder / FILE)
    twice = json.dumps({NAME: header[NAME] | {"dtype": "I8"}}).encode()[:-1] + b"," + text[1:]
    for made, part in (
        (twice, "twice, with different values"),
        (b"[" * 100_000, "recursion"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "levels deep"),
        (b"\xff\xfe" + text, "utf-8"),
        (b"[]", "not a JSON object"),
        (text[:-1] + b', "\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', "surrogate"),
        (text[:-1] + b', "__metadata__": {"format": 1}}', "twice"),
        (json.dumps(header | {"__metadata__": {"format": 1}}).encode(), "non-string values"),
        (json.dumps(header | {"__metadata__": ["pt"]}).encode(), "non-string values"),
    ):  # fmt: skip
        put(folder / FILE, made, data)
        refused(folder, file, part)
    put(folder / FILE, header, data + b"1234")
    refused(folder, file, "4 bytes after its last tensor")
    for length in (0, len(text) + len(data) + 1, 1 << 63):
        put(folder / FILE, header, data, length)
        refused(folder, file, "cut short")
    (folder / FILE).write_bytes(b"")
    refused(folder, file, "cut short")


def test_what_is_accepted_is_what_safetensors_reads(tmp_path):
    """Headers with a few bytes or fields changed, at random."""
    file, rng = tmp_path / FILE, random.Random(0)
    made = {"a": torch.arange(4), "b.c": torch.ones(2, 3), "e": torch.empty(0, 3)}
    save_file(made | {"h": torch.ones(5).byte()}, file, metadata={"format": "pt"})
    header, data = parts_of(file)
    values = (0, 1, -1, 2, 3, 8, 40, True, None, "F32", "I64", "U8", [], [8], 1.5, 10**20)
    accepted = 0
    for _ in range(500):
        changed = json.loads(json.dumps(header))
        if rng.random() < 0.5:
            record = changed[rng.choice(list(header))]
            field = rng.choice(list(record))
            at = rng.choice([None, 0, 1])
            if at is None or not isinstance(record[field], list) or len(record[field]) <= at:
                record[field] = rng.choice(values)
            else:
                record[field][at] = rng.choice(values)
            text = json.dumps(changed).encode()
        else:
            text = bytearray(json.dumps(changed).encode())
            text[rng.randrange(len(text))] = rng.randrange(256)
        put(file, bytes(text), data[: len(data) - (rng.random() < 0.1)])
        try:
            with safe_open(file, "pt") as tensors:
                want = {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
        except SafetensorError:
            want = None
        try:
            got = {n: entry.shape for n, entry in read_folder(tmp_path).items()}
        except ValueError:
            got = None
        assert got == want, text
        accepted += got is not None
    assert accepted > 10


# --- which files ----------------------------------------------------------------------------------


def test_a_file_and_an_index_that_differ(folder, sharded, tensors):
    for file in sharded.iterdir():
        if file.name != "config.json":
            os.link(file, folder / file.name)
    assert len(read_folder(folder)) == len(tensors)  # equal, bit for bit
    changed = tensors[NAME].clone()
    changed[0, 0, 0] ^= 1
    save_file(tensors | {NAME: changed}, folder / FILE, metadata={"format": "pt"})
    refused(folder, f"{NAME}: differs between", str(folder / FILE), str(folder / INDEX), "1 such")
    save_file({n: t for n, t in tensors.items() if n != NAME}, folder / FILE)
    refused(folder, f"{NAME}: differs between")


def test_an_index_of_the_one_file(folder, tensors):
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, FILE)}
    (folder / INDEX).write_text(json.dumps(index))
    assert read_folder(folder).keys() == tensors.keys()


def test_the_file_that_config_json_names(folder, tensors):
    """transformers reads it in the place of model.safetensors."""
    other = {n: torch.zeros_like(t) for n, t in tensors.items()}
    record = json.loads((folder / "config.json").read_text())
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(record | {"transformers_weights": "other.safetensors"})
    )
    refused(folder, "all zeros")
    for name in ("../other.safetensors", "/other.safetensors", "other.bin", 1, ["x"], ""):
        (folder / "config.json").write_text(json.dumps(record | {"transformers_weights": name}))
        refused(folder, "config.json", "transformers_weights")


@pytest.mark.parametrize("to", [
    f"../outside/{SHARD}", f"/tmp/{SHARD}", f"./{SHARD}", f"sub/{SHARD}", "", ".", "..", "model.bin", "x\0.safetensors",
    1, None, [SHARD], {"a": SHARD}, True,
], ids=repr)  # fmt: skip
def test_paths_in_an_index(to, sharded, tmp_path):
    (tmp_path / "outside").mkdir()
    os.link(sharded / SHARD, tmp_path / "outside" / SHARD)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {n: to if f == SHARD else f for n, f in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, str(sharded / INDEX), "own folder", "_scales: ")


def test_indexes(sharded):
    file = sharded / INDEX
    index = json.loads(file.read_text())
    for text in (
        "", "[]", "null", "{}", "nonsense", '{"metadata": {}, "weight_map": NaN}', "[" * 100_000,
        '{"metadata": {}, "weight_map": {}}', '{"metadata": {}, "weight_map": []}',
        json.dumps({"weight_map": index["weight_map"]}), json.dumps(index | {"metadata": 1}),
        '{"metadata": {}, "weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
        '{"metadata": {"total_size": 1' + "0" * 5000 + '}, "weight_map": {}}',
    ):  # fmt: skip
        file.write_text(text)
        refused(sharded, str(file))
    file.write_bytes(b"\xff\xfe")
    refused(sharded, str(file), "utf-8")


@pytest.mark.parametrize("name", [FILE, "config.json", "generation_config.json", INDEX, SHARD])
def test_what_is_no_file(name, folder, sharded):
    """A pipe is never opened: that would wait for a writer."""
    signal.alarm(60)
    where = sharded if name in (INDEX, SHARD) else folder
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        (where / name).unlink(missing_ok=True)
        make(where / name)
        refused(where, str(where / name), "not a regular file")
        os.rmdir(where / name) if (where / name).is_dir() else os.unlink(where / name)
    signal.alarm(0)


def test_links_are_followed(folder, tmp_path, tensors):
    """The Hub's cache is a folder of links to blobs."""
    blob = tmp_path / "blob"
    (folder / FILE).rename(blob)
    (folder / FILE).symlink_to(blob)
    assert read_folder(folder).keys() == load_file(blob).keys() == tensors.keys()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_the_place_of_an_adapters_file(name, tmp_path):
    def stop(*args):
        raise TimeoutError("waited for the pipe")

    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    try:
        with pytest.raises(ValueError, match=f"{name}: .* not a regular file"):
            load_adapter(torch.nn.Linear(1, 1), tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
