"""from_pretrained of damaged and contradictory folders: what loads is what the folder says, what does not is
refused with the file or tensor and a remedy. ``--fuzz 1000`` runs longer; see ``_fuzz.py``."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("transformers")
import _fuzz
import huggingface_hub.constants
import transformers
from _fuzz_cases import STRANGERS, on_config, on_files, on_index, on_json, on_tensors, one, several
from _fuzz_files import OUTSIDE, SINGLE, mutated, packed, read, sharded, tensors_in, write
from _fuzz_oracle import problems, unused
from test_load import config_of, tensors_of, write_llama
from test_load import write as write_gpt_oss

from torchao_mx import MXWeightOnlyConfig
from torchao_mx.hf import from_pretrained

GENERATION = "generation_config.json"
ADAPTER = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "nosuch/name",
}


def _llama(folder):
    write_llama(folder)


def _qwen3_moe(folder):
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _gpt_oss(folder):
    config = config_of()
    write_gpt_oss(folder, config, tensors_of(config))
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0}))


def _gpt_oss_bf16(folder):
    torch.manual_seed(0)
    config = config_of()
    model = transformers.GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(folder)


FAMILIES = {
    "gpt_oss": _gpt_oss,
    "gpt_oss_bf16": _gpt_oss_bf16,
    "llama": _llama,
    "qwen3_moe": _qwen3_moe,
}


@functools.cache
def base(family, shards):
    """An undamaged folder's files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        FAMILIES[family](path)
        files = read(path)
    return files if shards == 1 else sharded(files, shards)


def options(family):
    return {} if family == "gpt_oss" else {"config": MXWeightOnlyConfig()}


def names_in(files):
    """What a refusal may name: the folder's files, tensors and the modules that hold them."""
    tensors = {n for c in files.values() if isinstance(c, bytes) for n in tensors_in(c) or ()}
    modules = {n.rpartition(".")[0] for n in tensors if n.count(".") > 2}
    return {*files, *tensors, *modules} - {""}


def names(family, shards, files):
    return (
        names_in(base(family, shards))
        | names_in(files)
        | {"config.json", SINGLE, OUTSIDE, *STRANGERS}
    )


def run(folder, family, shards, mutations):
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # nothing here may ask the Hub
    original = base(family, shards)
    files = mutated(original, mutations)
    path = folder / "model"
    (folder / OUTSIDE).write_bytes(
        next(c for n, c in original.items() if n.endswith(".safetensors"))
    )
    locked = write(files, path)
    with _fuzz.listening() as said:
        try:
            with _fuzz.unprivileged(folder, locked):
                model = from_pretrained(path, **options(family))
        except Exception as error:
            return _fuzz.judge_refusal(error, names(family, shards, files))
    wrong = problems(model, path)
    if wrong:
        return _fuzz.Verdict("wrong load", "\n".join(wrong[:8]))
    ignored = [n for n in unused(path, model) if n not in said.getvalue()]
    if ignored and "UNEXPECTED" not in said.getvalue() and "were not used" not in said.getvalue():
        return _fuzz.Verdict("tensors ignored without a word", "\n".join(ignored[:8]))
    return _fuzz.Verdict(_fuzz.LOADED)


def mutations(files):
    """Of a checkpoint."""
    plain = {name: content for name, content in files.items() if isinstance(content, bytes)}
    tensor = st.sampled_from(sorted({n for c in plain.values() for n in tensors_in(c) or ()}))
    change = st.one_of(
        st.none(), one("fill", tensor, 1), one("drop", tensor), one("exchange", tensor, tensor)
    )
    beside = [
        one("both_layouts", change),
        one("add", "pytorch_model.bin", st.sampled_from([b"", b"PK\x03\x04"])),
        one(
            "add",
            "adapter_config.json",
            st.sampled_from([json.dumps(ADAPTER).encode(), b"", b"{}", b"[]"]),
        ),
        one("add", "other.safetensors", st.sampled_from([b"", plain.get(SINGLE, b"")[:0]])),
        one("add", "extra.txt", b"text"),
    ]
    generation = [on_json(files, GENERATION)] if GENERATION in files else []
    return st.one_of(
        on_tensors(files), on_tensors(files), on_tensors(files), on_config(files), on_config(files), on_index(files),
        on_files(plain), st.one_of(beside), *generation,
    )  # fmt: skip


_CASES = [(family, shards) for family in FAMILIES for shards in (1, 3)]


def cases():
    def of(which):
        return several(mutations(base(*which))).map(lambda drawn: (*which, drawn))

    return st.sampled_from(_CASES).flatmap(of)


def test_from_pretrained(request):
    _fuzz.fuzz(request, run, cases(), examples=50)


@pytest.mark.parametrize("which", _CASES, ids=str)
def test_undamaged(which):
    assert _fuzz.once(run, *which, ()) == _fuzz.Verdict(_fuzz.LOADED)


def test_a_wrong_load_is_seen(tmp_path):
    """A bit of a packed weight, an ulp of a norm, two equal shapes exchanged, a weight made up."""
    write(base("gpt_oss", 1), tmp_path / "model")
    model = from_pretrained(tmp_path / "model")
    layers = model.model.layers
    assert problems(model, tmp_path / "model") == []
    weight = layers[1].mlp.experts.down_proj.data
    bytes_ = weight.qdata.view(torch.uint8)
    norm, queries = (
        layers[0].input_layernorm.weight.data,
        [layer.self_attn.q_proj.weight for layer in layers],
    )

    def seen(change, undo, name):
        change()
        [problem] = problems(model, tmp_path / "model")
        assert problem.startswith(name), problem
        undo()

    def flip():
        bytes_[0, 0, 0] ^= 8

    seen(flip, flip, "model.layers.1.mlp.experts.down_proj")
    bits = norm.view(torch.int16)
    seen(
        lambda: bits[:1].add_(1), lambda: bits[:1].sub_(1), "model.layers.0.input_layernorm.weight"
    )
    kept = queries[0].data
    seen(
        lambda: setattr(queries[0], "data", queries[1].data), lambda: setattr(queries[0], "data", kept),
        "model.layers.0.self_attn.q_proj.weight",
    )  # fmt: skip
    head = model.lm_head.weight.data.clone()
    seen(
        lambda: model.lm_head.weight.data.normal_(),
        lambda: model.lm_head.weight.data.copy_(head),
        "lm_head.weight",
    )
    assert problems(model, tmp_path / "model") == []


CONTRADICTORY = (("nested", "config.json", "tie_word_embeddings", True),)


@pytest.mark.parametrize(
    "which", [("gpt_oss", 1), ("gpt_oss_bf16", 3), ("llama", 1), ("qwen3_moe", 3)], ids=str
)
def test_a_head_that_is_tied_to_another_value(which):
    verdict = _fuzz.once(run, *which, CONTRADICTORY)
    assert (
        verdict.kind == _fuzz.REFUSED
        and "lm_head.weight: differs from model.embed_tokens" in verdict.text
    )


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_a_head_that_is_tied(family, tmp_path):
    """There with the same value, as some tools write it, or not at all."""
    files = mutated(base(family, 1), CONTRADICTORY)
    tensors = tensors_in(files[SINGLE])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for i, kept in enumerate(
        (tensors, {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    ):
        write(files | {SINGLE: packed(kept)}, tmp_path / str(i))
        model = from_pretrained(tmp_path / str(i), **options(family))
        assert problems(model, tmp_path / str(i)) == []
