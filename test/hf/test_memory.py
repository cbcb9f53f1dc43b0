"""What transformers, safetensors and Accelerate make of the memory of packed weights."""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import pytest
import torch

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from test_load import config_of, tensors_of, write

from torchao_mx import MXFP4, MXTensor
from torchao_mx.hf import from_pretrained


def test_memory_footprint_is_that_of_the_packed_weights(tmp_path):
    config = config_of(96)
    model = from_pretrained(write(tmp_path / "model", config, tensors_of(config)))
    packed = [p for p in model.parameters() if isinstance(p, MXTensor)]
    assert packed
    held = sum(sum(t.numel() * t.element_size() for t in (p.qdata, p.scale)) for p in packed)
    tensors = [*model.parameters(), *model.buffers()]
    rest = sum(t.numel() * t.element_size() for t in tensors if not isinstance(t, MXTensor))
    assert model.get_memory_footprint() == held + rest


def test_safetensors_writes_no_empty_weight(tmp_path):
    w = MXTensor.from_hp(torch.randn(32, 64), MXFP4)
    with pytest.raises((TypeError, RuntimeError)):
        safetensors.save({"w": w, "other": w.clone()})
