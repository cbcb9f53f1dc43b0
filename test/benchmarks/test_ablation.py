"""benchmarks/models/ablation.py: its modes take out what they say, and put it back."""

import types

import pytest
import torch

from benchmarks.models import ablation
from torchao_mx.ops.core import launch, register, replay
from torchao_mx.ops.packed_mm import op, portable

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("mode", "calls"),
    [(ablation.today, 2), (ablation.without_recorder, 5), (ablation.with_tritons_launch, 5)],
)
def test_recorder(mode, calls):
    seen = []

    def add(x):
        seen.append(x)
        return x + 1

    recorded = replay.replayed(add)
    with mode():
        for i in range(5):
            assert torch.equal(recorded(torch.full((3,), i)), torch.full((3,), i + 1))
        assert len(seen) == calls


def test_tritons_launch():
    kernel = type("Kernel", (dict,), {"fn": staticmethod(lambda x: None), "params": (), "__name__": "kernel"})({(4,): "its own"})  # fmt: skip
    own = launch.launched(kernel)
    with ablation.with_tritons_launch():
        assert own[(4,)] == "its own"
    with ablation.without_recorder():
        assert own[(4,)].func.__func__ is launch.launched._launch


def test_strategies():
    fp8 = ("auto", "float8_e4m3fn", CUDA, torch.bfloat16, 64, 4, True, True)
    dense = ("auto", "", CUDA, torch.bfloat16, 64, None, True, True)
    grouped = ("auto", "", CUDA, torch.bfloat16, 64, 4, True, True)
    expected = {
        ablation.today: ["fused8", "fused", "fused"],
        ablation.without_fused8: ["unpack8", "fused", "fused"],
        ablation.without_dense_fused: ["fused8", "unpack", "fused"],
    }
    for mode, want in expected.items():
        with mode():
            assert [op.choose_strategy(*case) for case in (fp8, dense, grouped)] == want
    assert op.choose_strategy(*fp8) == "fused8"


def test_tiles():
    def runs():
        tiles = [portable._choose_tile(4096, 8, torch.bfloat16, True, True, m) for m in (8, 9, 10)]
        return [tile.run for tile in tiles]

    before = runs()
    assert before == [4, 2, 0]
    with ablation.without_runs():
        assert runs() == [0, 0, 0]
    with ablation.with_older_tiles():
        assert runs() == [4, 4, 4]
    assert runs() == before


def test_modes_forget_what_was_recorded():
    forgettable = [i for i in register.implementations.values() if hasattr(i, "forget")]
    assert len(forgettable) > 8
    dropped = []
    stub = types.SimpleNamespace(forget=lambda: dropped.append(1))
    register.implementations["stub", "cuda"] = stub
    try:
        with ablation.today():
            assert dropped == [1]
        assert dropped == [1, 1]
    finally:
        del register.implementations["stub", "cuda"]


def test_a_result_of_another_mode_is_compared():
    values = iter([1.0] * 3 + [1.5] * 3)
    subject = ablation.Subject("a step", None, lambda: {"y": torch.tensor([next(values)])})
    study = ablation.STUDIES["dense"]
    with pytest.raises(ablation.harness.WrongResult, match=r"a step, unpack, y: 0\.5 > 0\.02"):
        ablation.compare(study, subject)
