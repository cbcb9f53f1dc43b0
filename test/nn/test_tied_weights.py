"""Weights that two modules share: they stay tied in training; a warning names those that packing unties."""

import types
import warnings

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXTensor,
    MXWeightOnlyConfig,
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    check_model,
    is_linear,
    quantize_,
)

PTQ = MXWeightOnlyConfig()
PREPARE, CONVERT = QATConfig(PTQ, step="prepare"), QATConfig(PTQ, step="convert")
RECIPE, RECIPE_CONVERT = (NVFP4ForwardMXFP8BackwardConfig(step=s) for s in ("prepare", "convert"))
TIE = "embed.weight and head.weight are one parameter; packing head unties them: .* leave head out"


class LM(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.up = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.up(self.embed(ids)))


def ignoring(quantize, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize(*args, **kwargs)


@pytest.mark.parametrize(
    "config",
    [PTQ, PREPARE, MXWeightOnlyLoRAConfig(r=4), RECIPE],
    ids=["ptq", "qat", "lora", "recipe"],
)
def test_ties_are_named(config):
    """Before training already, where it is convert that will untie them."""
    for call in (check_model, quantize_):
        with pytest.warns(UserWarning, match=TIE) as record:
            call(LM(), config)
        assert len(record) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(LM(tied=False), config)
            call(LM(), config, filter_fn=lambda m, n: is_linear(m) and n != "head")


@pytest.mark.parametrize(
    ("prepare", "convert"), [(PREPARE, CONVERT), (RECIPE, RECIPE_CONVERT)], ids=["qat", "recipe"]
)
@pytest.mark.parametrize("quantize", [quantize_, torchao_quantize_], ids=["ours", "torchao's"])
def test_training_keeps_ties_and_convert_names_them(prepare, convert, quantize):
    model = LM()
    ignoring(quantize_, model, prepare)
    assert model.head.weight is model.embed.weight
    model(torch.arange(5)).sum().backward()
    assert model.embed.weight.grad[5:].abs().sum() > 0  # as the head
    # torchao tells a handler of the rest of a model only where it gives it the model.
    filter_fn = is_linear if quantize is quantize_ else lambda m, n: "no such name" not in n
    with pytest.warns(UserWarning, match=TIE):
        quantize(model, convert, filter_fn=filter_fn)
    assert isinstance(model.head.weight, MXTensor) and not isinstance(model.embed.weight, MXTensor)


def test_going_back_to_high_precision_keeps_ties():
    model = LM()
    ignoring(quantize_, model, PREPARE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, QATConfig(step="convert"))
    assert model.head.weight is model.embed.weight and type(model.head) is nn.Linear


def test_what_transformers_would_undo_is_said():
    for tied, text in ((True, "set model.config.tie_word_embeddings = False"), (False, "")):
        model = LM()
        model.config = types.SimpleNamespace(tie_word_embeddings=tied)
        with pytest.warns(UserWarning, match=TIE) as record:
            quantize_(model, PTQ)
        assert (
            (text in str(record[0].message)) if tied else ("config" not in str(record[0].message))
        )


def test_two_linear_layers():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    model["b"].bias = model["a"].bias
    with pytest.warns(
        UserWarning, match=r"a\.weight and b\.weight are .*packing a and b unties"
    ) as r:
        quantize_(model, PTQ)
    assert len(r) == 1
    assert torch.equal(model["a"].weight.qdata, model["b"].weight.qdata)
