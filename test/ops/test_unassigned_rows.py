"""Modules of experts, in every recipe: rows and slots of no expert here influence nothing."""

import pytest
import torch
from _experts import EXPERTS, HIDDEN, Concatenated, GptOss, Titan
from _grids import BASES, randn
from conftest import CUDA
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig

from torchao_mx import (
    MXWeightOnlyLoRAConfig,
    NVFP4ForwardMXFP8BackwardConfig,
    is_experts,
)

RECIPES = {
    **{f"ptq_{name}": [BASES[name]] for name in ("w4a16", "nvfp4_weight_only", "w4a8", "nvfp4")},
    **{
        f"qat_{name}": [QATConfig(BASES[name], step="prepare")]
        for name in ("w4a16", "w4a4", "w4a8", "nvfp4")
    },
    "lora": [MXWeightOnlyLoRAConfig(r=4)],
    "lora_nvfp4": [MXWeightOnlyLoRAConfig(r=4, block_size=16)],
    "recipe": [NVFP4ForwardMXFP8BackwardConfig()],
    "recipe_stochastic": [NVFP4ForwardMXFP8BackwardConfig(stochastic_rounding=True)],
}
VALUES = (0.0, 1e3, 1e30, torch.inf, torch.nan)
COUNTS = [3, 0, 5, 2]  # rows of each expert, torchtitan's way: six more are unassigned
IDS = torch.tensor([[0, 9], [2, 3], [9, 9], [0, 2], [9, 9], [3, 9]])  # 9: an expert of another rank


def prepared(cls, recipe, device):
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = torch.nn.ModuleDict({"experts": cls()}).to(device, dtype)
    for config in RECIPES[recipe]:
        quantize_(model, config, filter_fn=is_experts)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(p)
    return model["experts"], dtype


def results(module, inputs, wanted):
    """The output and every gradient, of a loss that weighs each element differently."""
    torch.manual_seed(1)
    module.zero_grad(set_to_none=True)
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    y = module(*leaves)
    y.backward(randn(*y.shape, seed=8).to(y) * wanted)
    grads = [t.grad for t in (*leaves, *module.parameters()) if t.grad is not None]
    return [y.detach(), *grads]


def check(module, samples):
    first = None
    for inputs, wanted in samples:
        found = results(module, inputs, wanted)
        first = found if first is None else first
        assert len(found) == len(first) > 1
        for actual, expected in zip(found, first, strict=True):
            assert torch.equal(actual, expected)
    assert first[0].any() and all(t.isfinite().all() for t in first)


@pytest.mark.parametrize("where", ["cpu", CUDA])
@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_after_the_last_expert(recipe, where):
    """What they hold, and what gradient comes for them."""
    module, dtype = prepared(Titan, recipe, where)
    counts = torch.tensor(COUNTS, device=where)
    n_rows = sum(COUNTS) + 6
    samples = []
    for value in VALUES:
        x, wanted = randn(n_rows, HIDDEN, seed=2), torch.ones(n_rows, 1)
        x[sum(COUNTS) :], wanted[sum(COUNTS) :] = value, value
        samples.append(((x.to(where, dtype), counts), wanted.to(where)))
    check(module, samples)
    y = module(*samples[-1][0])
    assert not y[sum(COUNTS) :].any()


@pytest.mark.parametrize("where", ["cpu", CUDA])
@pytest.mark.parametrize("cls", [Concatenated, GptOss])
@pytest.mark.parametrize("recipe", RECIPES)
def test_slots_of_other_ranks(recipe, cls, where):
    """Tokens without an expert here, and the routing weights of experts that are not."""
    module, dtype = prepared(cls, recipe, where)
    elsewhere = IDS >= EXPERTS
    weights = torch.rand(IDS.shape, generator=torch.manual_seed(3))
    samples = []
    for value in VALUES:
        x, w = randn(len(IDS), HIDDEN, seed=2), weights.clone()
        x[elsewhere.all(1)], w[elsewhere] = value, value
        samples.append(((x.to(where, dtype), IDS.to(where), w.to(where, dtype)), 1.0))
    check(module, samples)
