"""Tensors without memory of their own: torch functions that ask for memory return the right answer or raise."""

import copy
import io
import multiprocessing.reduction as reduction
import pickle
import types

import pytest
import torch
import torch.multiprocessing as tmp
from _memory_sweep import KINDS, VALUES, sweep
from torch import nn

from torchao_mx import MXFP4, MXFP8_E4M3, NVFP4, MXTensor
from torchao_mx.ops.core import launch

# What torch says where it has no hook to say more; such functions are private, or for other devices.
UNHOOKED = ("Cannot access data pointer of Tensor", "its data is not allocated")


def fault(kind, name, outcome, text):
    """What is wrong with how a call ended; None for nothing."""
    private = name.split(".")[-1].startswith("_") and not name.endswith("__")
    if "died" in outcome or outcome == "returned other values":
        return f"{name}: {outcome} {text}"
    if outcome == "returned" or private or any(known in text for known in UNHOOKED):
        return None
    if kind == "master" and "out-of-place operator" in text:
        return None
    says_so = (
        outcome in ("NotImplementedError", "TypeError", "ValueError") and "dequantize()" in text
    )
    return None if says_so and kind != "master" else f"{name}: {outcome}: {text}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_and_function_of_torch(kind, tmp_path):
    ends = sweep(kind, tmp_path)
    assert [f for end in ends if (f := fault(kind, *end))] == []
    names = {name for name, _, _ in ends}
    assert {"Tensor.apply_", "Tensor.share_memory_", "torch.from_dlpack", "set_(storage)"} < names
    assert len(names) > (1000 if kind == "mx" else 400)


def linear(weight):
    """A model with a packed weight, as quantize_ leaves it."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=str)
def test_share_memory_shares_the_bytes(fmt):
    model = linear(MXTensor.from_hp(VALUES, fmt))
    want = model[0].weight.dequantize()
    assert not model[0].weight.is_shared()
    assert model.share_memory() is model
    w = model[0].weight
    assert w.is_shared() and all(part.is_shared() for part in w.parts())
    assert torch.equal(w.dequantize(), want)
    # What another process receives: the same memory, in a new tensor.
    received = pickle.loads(reduction.ForkingPickler.dumps(model))[0].weight
    assert torch.equal(received.dequantize(), want)
    received.qdata.view(torch.uint8).zero_()
    assert not w.dequantize().any()


def _clear(model, results, received):
    model[0].weight.qdata.zero_()
    results.put(model[0].weight)
    received.wait()  # what it sends lives as long as it does


def test_another_process_writes_to_a_shared_weight():
    model, context = linear(MXTensor.from_hp(VALUES, MXFP4)).share_memory(), tmp.get_context("fork")
    results, received = context.SimpleQueue(), context.Event()
    process = context.Process(target=_clear, args=(model, results, received), daemon=True)
    process.start()
    sent = results.get()
    received.set()
    process.join()
    assert isinstance(sent, MXTensor)
    assert not sent.dequantize().any()
    assert not model[0].weight.dequantize().any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_torchscript_files_load_no_zeros(how):
    model = linear(MXTensor.from_hp(VALUES, MXFP4)).eval()
    file = io.BytesIO()
    compiled = torch.jit.trace(model, VALUES) if how == "trace" else torch.jit.script(model)
    torch.jit.save(torch.jit.freeze(compiled) if how == "freeze" else compiled, file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="storage only has 0 bytes"):
        torch.jit.load(file)


def test_copies_and_files_have_the_values(tmp_path):
    w = MXTensor.from_hp(VALUES, NVFP4)
    assert torch.equal(copy.copy(w).dequantize(), w.dequantize())
    for new_format in (True, False):
        torch.save(w, tmp_path / "w", _use_new_zipfile_serialization=new_format)
        assert torch.equal(torch.load(tmp_path / "w").dequantize(), w.dequantize())
    other = MXTensor.from_hp(-VALUES, NVFP4)
    torch.utils.swap_tensors(w, other)
    assert torch.equal(other.dequantize(), -w.dequantize())
    batch = torch.utils.data.default_collate([w, other])
    assert torch.equal(batch.dequantize(), torch.stack([w.dequantize(), other.dequantize()]))


# --- GPUs that kernels do not run on --------------------------------------------------------------


class Kernel:
    """One that Triton is not to see; ``params`` tells a compiled one from one that is interpreted."""

    params = ()
    __name__ = "kernel"

    @staticmethod
    def fn(x):
        pass

    def __getitem__(self, grid):
        pytest.fail("compiled")


@pytest.mark.parametrize(
    ("hip", "capability", "match"),
    [("6.4", (9, 4), r"ROCm.*8\.0.*CPU"), (None, (7, 5), r"7\.5.*8\.0.*CPU")],
    ids=["rocm", "turing"],
)
def test_gpus_are_refused_before_a_kernel_compiles(monkeypatch, hip, capability, match):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launch.capability.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match=match):
            launch.on_device_of(types.SimpleNamespace(device=torch.device("cuda", 0)))
        with pytest.raises(NotImplementedError, match=match):
            launch.launched(Kernel())[(1,)](VALUES)
    finally:
        launch.capability.cache_clear()


# --- a packed weight in a layer of another format -------------------------------------------------


def test_a_weight_is_not_decoded_in_its_layers_format():
    from torchao_mx import MXFakeQuantizeConfig, MXFakeQuantizedLinear

    config = MXFakeQuantizeConfig(torch.float8_e5m2)
    for activation in (None, config):
        layer = MXFakeQuantizedLinear(32, 32, weight_config=config, activation_config=activation)
        layer.weight = nn.Parameter(MXTensor.from_hp(VALUES, MXFP8_E4M3), requires_grad=False)
        with pytest.raises(ValueError, match=r"mxfp8_e4m3.*mxfp8_e5m2.*dequantize\(\)"):
            layer(VALUES)
        layer.weight = nn.Parameter(MXTensor.from_hp(VALUES, MXFP8_E4M3).mT, requires_grad=False)
        with pytest.raises(ValueError, match=r"dequantize\(\)"):
            layer(VALUES)
