"""The fuzzers' own machinery: dying and hanging cases are told, refusals judged, failing cases made smaller."""

import json
import os
import signal
import time

import _fuzz
import pytest
import torch
from _fuzz_files import INDEX, SINGLE, mutated, packed, record_of, sharded, write
from _fuzz_oracle import Unreadable, decoded, read_file, read_tensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(4, dtype=torch.uint8)}
FILES = {
    "config.json": b"{}",
    SINGLE: packed(
        {
            n: record_of({torch.float32: "F32", torch.uint8: "U8"}[t.dtype], t)
            for n, t in TENSORS.items()
        }
    ),
}


def case(folder, what):
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(100)
    if what == "memory":
        bytearray(_fuzz.MEMORY + (1 << 30))
    return _fuzz.Verdict(_fuzz.LOADED, what)


def test_a_worker_outlives_its_cases():
    worker = _fuzz.Worker(case, seconds=3)
    try:
        kinds = [worker(what).kind for what in ("fine", "crash", "fine", "hang", "fine", "memory")]
    finally:
        worker.close()
    assert kinds == [
        "loaded",
        "crash: SIGSEGV",
        "loaded",
        "hang",
        "loaded",
        "MemoryError of the fuzzer",
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("model.safetensors: cut short; download it again"), _fuzz.REFUSED),
        (OSError("a.weight: missing; export the checkpoint again"), _fuzz.REFUSED),
        (ValueError("model.safetensors: cut short"), _fuzz.VAGUE),
        (ValueError("invalid literal; download it again"), _fuzz.VAGUE),
        (KeyError("model.safetensors"), "KeyError"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
    ],
)
def test_refusals(error, kind):
    assert _fuzz.judge_refusal(error, {SINGLE, "a.weight"}).kind == kind


def test_a_failing_case_is_made_smaller():
    def worker(base, mutations):
        return _fuzz.Verdict("bad" if 3 in mutations and 5 in mutations else _fuzz.LOADED)

    assert _fuzz.smaller(("base", (1, 3, 4, 5)), "bad", worker) == ("base", (3, 5))


def test_the_reader(tmp_path):
    for i, files in enumerate((FILES, sharded(FILES, 2))):
        write(files, tmp_path / str(i))
        found = read_tensors(tmp_path / str(i))
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[n], t) for n, t in TENSORS.items())


BAD = {
    "cut": ("cut", SINGLE, -1),
    "longer": ("splice", SINGLE, 10**6, 0, b"x"),
    "a hole": ("forget", SINGLE, "a.weight"),
    "an overlap": ("alias", SINGLE, "a.weight", "b.weight"),
    "a negative": ("shift", SINGLE, "a.weight", -1, 0),
    "a shape": ("field", SINGLE, "a.weight", "shape", [3, 3]),
    "a boolean": ("field", SINGLE, "a.weight", "shape", [2, 3, True]),
    "a dtype": ("field", SINGLE, "a.weight", "dtype", "F64"),
    "depth": ("header", SINGLE, b'{"a":' * 50_000),
    "not all": ("both_layouts", ("drop", "a.bias")),
    "outside": ("add", "config.json", b""),
}


@pytest.mark.parametrize("which", BAD)
def test_what_the_reader_refuses(which, tmp_path):
    files = mutated(FILES, [BAD[which]])
    if which == "outside":
        files = sharded(FILES, 2)
        index = json.loads(files[INDEX])
        index["weight_map"]["a.bias"] = f"../model/{index['weight_map']['a.bias']}"
        files[INDEX] = json.dumps(index).encode()
    write(files, tmp_path / "model")
    with pytest.raises(Unreadable):
        read_tensors(tmp_path / "model")


def test_the_table_of_mxfp4():
    """OCP MX 1.0, 5.3.3 and 5.4.1, by example: every code, low nibble first, scales 1/2 and the least."""
    blocks = (
        torch.arange(16, dtype=torch.uint8).view(1, 16) | 0x20
    )  # 1.0 second, of every code first
    values = decoded(blocks, torch.tensor([126], dtype=torch.uint8))
    positive = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    assert values[::2].tolist() == positive + [-v for v in positive]
    assert values[1::2].tolist() == [0.5] * 16
    least = decoded(blocks, torch.tensor([0], dtype=torch.uint8))
    assert least[2].item() == 2.0**-128
    assert decoded(blocks, torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_a_name_that_is_there_twice(tmp_path):
    files = mutated(FILES, [("twice", SINGLE, "a.bias", "a.bias")])
    write(files, tmp_path / "model")
    assert read_file(tmp_path / "model" / SINGLE).keys() == TENSORS.keys()
