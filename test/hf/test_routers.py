"""What from_pretrained leaves in high precision by its role, and what it says of it."""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import re
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
from test_load import V5, config_of, tensors_of, write
from test_quantize import DENSE, checkpoint, packed_names
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from torchao.quantization.qat import QATConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from torchao_mx import (
    MXFakeQuantizedLinear,
    MXTensor,
    MXWeightOnlyConfig,
    is_linear,
    quantize_,
)
from torchao_mx.hf import from_pretrained
from torchao_mx.hf.roles import kept_linears
from torchao_mx.hf.while_loading import selection

MXFP4 = MXWeightOnlyConfig()
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
CHOICES = {aten.topk.default, aten.argmax.default}


class Choices(TorchDispatchMode):
    """Finds the linear layers whose output comes to a choice, through whatever is not a product itself."""

    def __init__(self, model):
        super().__init__()
        self.found = set()
        self.weights, self.outputs = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                self.weights[module.weight] = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        if func in CHOICES:
            self.found |= self.outputs.get(inputs[0], set())
        names = {self.weights[t] for t in inputs if t in self.weights}
        if func in PRODUCTS or "attention" in str(func):
            sources = names
        else:
            sources = set().union(*(self.outputs.get(t, set()) for t in inputs))
            if names and len(inputs) == 1:  # a view or a cast of a weight
                self.weights.update((t, next(iter(names))) for t in outputs)
        self.outputs.update((t, sources) for t in outputs if sources and t not in self.weights)
        return out


MOE = DENSE | dict(
    num_key_value_heads=4, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=64, n_group=1, topk_group=1, head_dim=16, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, qk_head_dim=32
)  # fmt: skip
LLAMA4 = dict(moe_layers=[0, 1], intermediate_size_mlp=96, attention_chunk_size=16)
LONGCAT = LATENT | dict(
    ffn_hidden_size=96, expert_ffn_hidden_size=64, moe_topk=2, zero_expert_num=2
)
SWITCH = dict(
    d_model=64, d_kv=16, d_ff=96, num_heads=4, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, expert_capacity=64, decoder_start_token_id=0,
)  # fmt: skip
GEMMA4 = dict(
    enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=32, vocab_size_per_layer_input=128,
    global_head_dim=16, num_global_key_value_heads=4, num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
DSA = LATENT | dict(first_k_dense_replace=1, index_n_heads=4, index_head_dim=32, index_topk=4)
# model -> (fields, the routers and gates that are linear layers); those in brackets are fed to no choice
BOTH = {
    "jetmoe": (
        dict(kv_channels=16, num_key_value_heads=2),
        ["mlp.router.layer", "self_attention.experts.router.layer"],
    ),
    "llama4_text": (LLAMA4, ["feed_forward.router"]),
    "longcat_flash": (LONGCAT, ["mlp.router.classifier"]),
    "switch_transformers": (SWITCH, ["layer.*.mlp.router.classifier"] * 2),
}
OF_5 = {
    "gemma4_text": (GEMMA4, ["router.proj"]),
    "qwen2_moe": (dict(shared_expert_intermediate_size=64), ["[mlp.shared_expert_gate]"]),
    "deepseek_v32": (
        DSA, [f"self_attn.indexer.{name}" for name in ("[wq_b]", "[wk]", "[weights_proj]")]
    ),
    "zaya": (
        dict(num_experts_per_tok=1), ["[mlp.gate.down_proj]", "[mlp.gate.router_mlp.fc1]", "[mlp.gate.router_mlp.fc2]",
             "mlp.gate.router_mlp.out_proj"],
    ),
}  # fmt: skip
OF_4 = {
    "granitemoe": ({}, ["block_sparse_moe.router.layer"]),
    "qwen2_moe": (
        dict(shared_expert_intermediate_size=64), ["mlp.gate", "[mlp.shared_expert_gate]"]
    ),
    "mixtral": ({}, ["block_sparse_moe.gate"]),
    "hunyuan_v1_moe": ({}, ["mlp.gate.wg"]),
}  # fmt: skip
MODELS = BOTH | (OF_5 if V5 else OF_4)


def built(name, fields, **options):
    auto = transformers.AutoModelForSeq2SeqLM if name.startswith("switch") else AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(MOE | fields))
    return auto.from_config(config, **options)


@pytest.mark.parametrize("name", MODELS)
def test_what_chooses_is_kept(name):
    """The layers of a name, and whatever a forward is seen to feed to a choice."""
    fields, expected = MODELS[name]
    model = built(name, fields).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    kept = kept_linears(model)
    selects, left = selection(model, MXFP4)
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    assert [n for n, m in linears.items() if selects(m, n)] == [n for n in linears if n not in kept]
    routers = {re.sub(r"\.\d+", ".*", n).split("*.", 1)[1] for n in left if n in linears}
    assert routers == {re.sub(r"[][]", "", n) for n in expected}
    ids = torch.randint(5, 100, (1, 12))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if "switch" in name else {})
    with torch.no_grad(), Choices(model) as spy:
        model(**inputs)
    assert spy.found <= kept.keys()
    seen = {re.sub(r"\.\d+", ".*", n).split("*.", 1)[1] for n in spy.found}
    assert seen == {n for n in expected if "[" not in n}


class Gated(nn.Module):
    """No router: its gate scales activations."""

    def __init__(self):
        super().__init__()
        self.gate, self.gate_proj, self.up = (nn.Linear(64, 64) for _ in range(3))


class Mixture(nn.Module):
    """One that calls its router by a name of its own."""

    def __init__(self):
        super().__init__()
        self.switch, self.gate = nn.Linear(64, 3), nn.Linear(64, 64)
        self.gate_proj, self.one = nn.Linear(64, 64), nn.Linear(64, 1)
        self.experts = nn.ModuleList(Gated() for _ in range(3))


def test_roles_of_layers_by_their_place():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DENSE))
    model.model.layers[0].mlp, model.model.layers[1].mlp = Gated(), Mixture()
    kept = kept_linears(model)
    prefix = "model.layers.1.mlp."
    assert kept.keys() == {"lm_head", prefix + "switch", prefix + "gate", prefix + "one"}


# --- what from_pretrained says --------------------------------------------------------------------


def loaded(folder, *args, **kwargs):
    """(the model, the lines of its one warning)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = from_pretrained(folder, *args, **kwargs)
    ours = [str(w.message) for w in caught if "left in high precision" in str(w.message)]
    assert len(ours) <= 1
    return model, ours[0].splitlines()[1:] if ours else []


def test_a_warning_names_what_is_left(tmp_path):
    name = "longcat_flash" if V5 else "qwen2_moe"  # whose experts are modules of their own
    _, lines = loaded(checkpoint(tmp_path, name, **MOE | MODELS[name][0]), config=MXFP4)
    if V5:
        experts, router = lines
        assert re.fullmatch(
            r"model\.layers\.\*\.mlp\.experts: LongcatFlashExperts holds gate_up_proj \[6, 128, 64\], "
            r"down_proj .*register_experts\(LongcatFlashExperts, layout\)", experts
        )  # fmt: skip
        assert router == "model.layers.*.mlp.router.classifier: a router or gate"
    else:
        assert lines == [
            "model.layers.*.mlp.gate (2): a router or gate",
            "model.layers.*.mlp.shared_expert_gate (2): a gate or head of one output",
        ]


def test_layers_that_do_not_fit_are_left_and_named(tmp_path):
    folder = checkpoint(tmp_path, "llama", **DENSE | dict(intermediate_size=72))
    model, lines = loaded(folder, config=MXFP4)
    [line] = lines
    assert re.match(
        r"model\.layers\.\*\.mlp\.down_proj \(2\): Linear.*\(64, 72\).*multiple of 32", line
    )
    assert {n.split(".")[-2] for n in packed_names(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    }  # fmt: skip


def test_nothing_is_said_of_a_model_quantized_but_for_its_head(tmp_path):
    model, lines = loaded(checkpoint(tmp_path, "llama"), config=MXFP4)
    assert lines == [] and "lm_head.weight" not in packed_names(model)


# --- filter_fn and auto_class ---------------------------------------------------------------------


def attention(module, name):
    return name == "lm_head" or (is_linear(module) and "self_attn" in name)


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_filter_fn_says_what_is_quantized(qat, tmp_path):
    """Heads too, and nothing else; layers that do not fit are its caller's."""
    folder = checkpoint(tmp_path, "llama", **DENSE | dict(intermediate_size=72))
    config = QATConfig(MXFP4, step="prepare") if qat else MXFP4
    model, lines = loaded(folder, config=config, filter_fn=attention)
    kind = (lambda m: isinstance(m, MXFakeQuantizedLinear)) if qat else is_packed_linear
    names = {n for n, m in model.named_modules() if kind(m)}
    assert names == {n for n, m in model.named_modules() if attention(m, n)} and not lines
    with pytest.raises(ValueError, match=r"mlp\.down_proj: .*multiple of 32.*") as info:
        from_pretrained(folder, config=config, filter_fn=lambda m, n: is_linear(m))
    assert "filter_fn" in str(info.value) or "cannot be quantized" in str(info.value)
    with pytest.raises(ValueError, match="filter_fn selects no module"):
        from_pretrained(folder, config=config, filter_fn=lambda m, n: False)
    with pytest.raises(TypeError, match=r"filter_fn='self_attn' must be a function"):
        from_pretrained(folder, config=config, filter_fn="self_attn")


def is_packed_linear(module):
    return is_linear(module) and isinstance(module.weight, MXTensor)


@pytest.mark.parametrize(
    ("auto_class", "labels"),
    [
        (AutoModelForSequenceClassification, 1),
        (AutoModelForSequenceClassification, 64),
        (AutoModelForTokenClassification, 3),
    ],
    ids=["reward", "sequence", "token"],
)
def test_classifiers(auto_class, labels, tmp_path):
    """A reward model of a language model's checkpoint: its head is new, and in high precision."""
    folder = checkpoint(tmp_path, "llama", pad_token_id=0)
    model, lines = loaded(folder, config=MXFP4, auto_class=auto_class, num_labels=labels)
    assert isinstance(model, auto_class._model_mapping[type(model.config)])
    packed = packed_names(model)
    assert len(packed) == 2 * 7 and not lines
    weight = model.score.weight
    assert weight.shape == (labels, 64) and type(weight.data) is torch.Tensor
    out = model(torch.randint(1, 100, (2, 5))).logits
    out.float().sum().backward()
    assert weight.grad.isfinite().all() and out.isfinite().all()


def test_a_classifier_of_a_packed_checkpoint(tmp_path):
    """Its experts are the file's; of the base model nothing may be missing."""
    config = config_of(num_labels=1)
    tensors = tensors_of(config)
    folder = write(tmp_path / "model", config, tensors)
    model, _ = loaded(folder, auto_class=AutoModelForSequenceClassification)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(model.get_parameter(name).mT.to_blocks()[0], tensors[f"{name}_blocks"])
    assert model.score.weight.shape == (1, 64) and type(model.score.weight.data) is torch.Tensor
    model(torch.randint(2, 100, (1, 5))).logits.float().sum().backward()
    assert model.score.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="filter_fn chooses what config quantizes"):
        from_pretrained(folder, filter_fn=attention)
    del tensors["model.norm.weight"]
    write(folder, config, tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: missing"):
        from_pretrained(folder, auto_class=AutoModelForSequenceClassification)


def test_a_class_that_loads_nothing_is_refused(tmp_path):
    with pytest.raises(TypeError, match="must be one of transformers' auto classes"):
        from_pretrained(tmp_path, config=MXFP4, auto_class=dict)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_a_weight_that_is_read_past_its_layer_is_kept(name, tmp_path):
    """Of a state space's steps, say: what is trained is what the converted model computes."""
    fields = dict(
        hidden_size=64, num_hidden_layers=2, vocab_size=128, time_step_rank=32, state_size=16,
        mamba_dt_rank=32, mamba_d_state=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, num_experts=1, attn_layer_period=2, attn_layer_offset=1,
        use_mamba_kernels=False, pad_token_id=0,
    )  # fmt: skip
    folder = checkpoint(tmp_path, name, **fields)
    base = MXFP4
    model, lines = loaded(folder, config=QATConfig(base, step="prepare"), dtype=torch.float32)
    is_read = [re.search(r"dt_proj( \(\d\))?: its weight is read by .*Mixer\.", t) for t in lines]
    assert any(is_read) != (name == "jamba" and not V5)  # which calls the layer
    ids = torch.randint(1, 100, (1, 6))
    with torch.no_grad():
        trained = model(ids).logits
        quantize_(model, QATConfig(base, step="convert"), filter_fn=lambda m, n: is_linear(m))
        assert torch.equal(model(ids).logits, trained)
        packed, _ = loaded(folder, config=base, dtype=torch.float32)
        # transformers knows that it is quantized, and has Jamba call the layer and subtract its bias.
        assert torch.allclose(packed(ids).logits, trained, rtol=1e-5, atol=1e-5)
