"""A head that shares the embedding's weight: what quantize_ says of it, and what transformers then does."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
from torch import nn
from torchao.quantization.qat import QATConfig
from transformers import AutoConfig, AutoModelForCausalLM

from torchao_mx import (
    MXTensor,
    MXWeightOnlyConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    is_linear,
    quantize_,
)

PTQ = MXWeightOnlyConfig()
STEPS = {
    "ptq": [PTQ],
    "qat": [QATConfig(PTQ, step=step) for step in ("prepare", "convert")],
    "recipe": [NVFP4ForwardMXFP8BackwardConfig(step=step) for step in ("prepare", "convert")],
}


def tied_model():
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("configs", STEPS.values(), ids=STEPS)
def test_the_advice_holds(configs):
    """With the config that the warning names, tie_weights leaves the packed head; without, it does not."""
    for is_said in (False, True):
        model = tied_model()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for config in configs:
            with pytest.warns(
                UserWarning, match=r"embed_tokens\.weight and lm_head\.weight are one"
            ) as record:
                quantize_(model, config)
            assert len(record) == 1
            assert "model.config.tie_word_embeddings = False" in str(record[0].message)
        packed = model.lm_head.weight
        assert isinstance(packed, MXTensor)
        if is_said:
            model.config.tie_word_embeddings = False
        model.tie_weights()
        assert (model.lm_head.weight is packed) == is_said
        assert isinstance(model.model.embed_tokens.weight.data, torch.Tensor)


def test_a_head_that_is_left_out_stays_tied_in_silence():
    model = tied_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, PTQ, filter_fn=lambda m, n: is_linear(m) and n != "lm_head")
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear and isinstance(
        model.model.layers[0].mlp.up_proj.weight, MXTensor
    )
