"""transformers' classes of experts: which are known, and that these compute what their eager forward does."""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import importlib
import importlib.util
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")
from _grids import generator
from test_load import V5
from torch import nn

from torchao_mx import MXExperts
from torchao_mx.nn.experts.module import layout_of, unclaimed_experts

E, H, INNER, K, T = 4, 64, 96, 2, 13


VALUES = dict(
    hidden_act="silu", mlp_hidden_act="relu2", moe_latent_size=None, swiglu_alpha=1.702, zero_expert_num=2,
    swiglu_limit=0.7, rms_norm_eps=1e-6, post_norm_eps=1e-6, num_experts_per_tok=K,
)  # fmt: skip


class Config:
    """What any class of experts asks its config for."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name in VALUES:
            return VALUES[name]
        if "expert" in name and ("num" in name or name.startswith("n_")):
            return E
        if "intermediate" in name or "ffn" in name:
            return INNER
        if "hidden" in name:
            return H
        raise AttributeError(name)


def experts(model, name, *args):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    made = getattr(module, name)(*(args or (Config(),)))
    g = generator(0)
    for p in made.parameters():
        nn.init.normal_(p, std=0.2, generator=g)
    return made


def arguments(kind, module):
    """(what a layer of this kind is called with, which of it wants gradients)."""
    g = generator(1)
    hidden = torch.randn(T, H, generator=g).requires_grad_()
    scores = torch.rand(T, E, generator=g)
    weights, ids = (t.detach() for t in scores.topk(K))
    if kind == "TransformersLayout":
        return (hidden, ids, weights.requires_grad_()), [hidden, weights]
    if kind == "GptOssV4Layout":
        return (hidden[None], ids, scores.requires_grad_()), [hidden, scores]
    if kind == "Llama4Layout":
        hidden = torch.randn(E * T, H, generator=g).requires_grad_()
        return (hidden,), [hidden]
    counts = [3, 0, 8, 2]
    return (hidden, torch.tensor(counts) if kind == "AriaLayout" else counts), [hidden]


# model -> (class, how it is called, arguments other than a config)
BOTH = {
    "gpt_oss": ("GptOssExperts", "TransformersLayout" if V5 else "GptOssV4Layout"),
    "llama4": ("Llama4TextExperts", "Llama4Layout"),
    "jetmoe": ("JetMoeParallelExperts", "GroupedLinearLayout", E, H, INNER),
}
OF_5 = {
    "nemotron_h": ("NemotronHExperts", "TransformersLayout"),
    "qwen3_moe": ("Qwen3MoeExperts", "TransformersLayout"),
    "deepseek_v4": ("DeepseekV4Experts", "TransformersLayout"),
    "aria": ("AriaExperts", "TransformersLayout"),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", "TransformersLayout"),
    "step3p7": ("Step3p7Experts", "TransformersLayout"),
}
OF_4 = {
    "granitemoe": ("GraniteMoeParallelExperts", "GroupedLinearLayout", E, H, INNER),
    "granitemoehybrid": ("GraniteMoeHybridParallelExperts", "GroupedLinearLayout", E, H, INNER),
    "aria": ("AriaGroupedExpertsGemm", "AriaLayout", H, INNER, E),
}
KNOWN = BOTH | (OF_5 if V5 else OF_4)


@pytest.mark.parametrize("model", KNOWN)
def test_known_experts_equal_eager(model):
    """With plain weights in fp32: the output, and the gradients of all inputs and parameters."""
    name, kind, *args = KNOWN[model]
    if model == "step3p7" and importlib.util.find_spec("transformers.models.step3p7") is None:
        pytest.skip("came later")
    source = experts(model, name, *args)
    assert type(layout_of(source)).__name__ == kind
    assert not unclaimed_experts(nn.ModuleDict({"experts": source}))
    inputs, leaves = arguments(kind, source)
    wanted = [*leaves, *source.parameters()]
    results = []
    for module in (source, MXExperts.stand_in(source)):
        y = module(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


UNKNOWN = (
    {
        "longcat_flash": (
            "LongcatFlashExperts",
            "LongcatFlashExperts holds gate_up_proj .*not of a known class",
        ),
        "muse_spark": ("MuseSparkExperts", "it normalizes each expert's output"),
        "inkling": (
            "InklingSharedExperts",
            "InklingSharedExperts holds gate_proj .*not of a known class",
        ),
    }
    if V5
    else {
        "qwen3_vl_moe": (
            "Qwen3VLMoeTextExperts",
            "Qwen3VLMoeTextExperts holds .*not of a known class",
        )
    }
)


@pytest.mark.parametrize("model", UNKNOWN)
def test_other_experts_are_reported(model):
    name, message = UNKNOWN[model]
    module = experts(model, name)
    assert layout_of(module) is None
    [reason] = unclaimed_experts(nn.ModuleDict({"experts": module})).values()
    assert re.search(message, reason)


def test_dbrx_holds_experts_in_matrices():
    if V5:
        from types import SimpleNamespace

        config = SimpleNamespace(
            hidden_size=H, ffn_hidden_size=INNER, moe_num_experts=E, ffn_act_fn={"name": "silu"}
        )
        module = experts("dbrx", "DbrxExpertGLU", config)
    else:
        module = experts("dbrx", "DbrxExpertGLU", H, INNER, E, {"name": "silu"})
    assert unclaimed_experts(module)[""].startswith(
        "DbrxExpertGLU holds w1 [384, 64], v1 [384, 64]"
    )


@pytest.mark.skipif(not V5, reason="4.57 has no interface of experts")
def test_subclasses_of_decorated_classes():
    """A gate of one's own is asked for; a forward of one's own is not guessed at."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Gated(MixtralExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return gate.tanh() * up

    class Computing(MixtralExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    source = Gated(Config())
    for p in source.parameters():
        nn.init.normal_(p, std=0.2, generator=generator(0))
    source.config._experts_implementation = "batched_mm"  # eager is written without _apply_gate
    inputs, _ = arguments("TransformersLayout", source)
    torch.testing.assert_close(MXExperts.stand_in(source)(*inputs), source(*inputs))
    assert layout_of(Computing(Config())) is None
    assert (
        "overrides forward of the known class MixtralExperts"
        in unclaimed_experts(Computing(Config()))[""]
    )
