"""load_adapter and merge_adapter of damaged and contradictory folders: what is loaded is what PEFT's layout says,
what is refused leaves the model as it was and names the file or tensor and a remedy."""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("transformers")
import _fuzz
from _fuzz_cases import on_files, on_json, on_tensors, one, several
from _fuzz_files import OUTSIDE, mutated, packed, read, record_of, tensors_in, value_of, write
from _fuzz_oracle import SaidAdapter, Unreadable, equal
from test_fuzz_checkpoints import base, names_in
from torchao.quantization import quantize_

from torchao_mx import MXWeightOnlyConfig, MXWeightOnlyLoRAConfig, is_experts, is_linear
from torchao_mx.hf import from_pretrained, load_adapter, merge_adapter, save_adapter
from torchao_mx.nn.lora import MXLoRAExperts, MXLoRALinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = MXWeightOnlyLoRAConfig(r=4, lora_alpha=6)
SAYS = {
    "peft_type": ["LORA", "lora", "ADALORA", None, 1, ["LORA"]],
    "r": [4, 4.0, 8, 0, -4, True, "4", None, 2**40, 2**63, "@nan", "@inf", [4]],
    "lora_alpha": [6, 6.0, 12, 0, -1, True, "6", None, "@nan", "@inf", 1e300],
    "use_rslora": [True, 1, "yes", None, "@nan"],
    "bias": ["all", "lora_only", None, 1],
    "init_lora_weights": [False, "gaussian", "pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "lora_ga", 3],
    "use_dora": [True, "false", 1],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "rank_pattern": [{"q_proj": 8}, {}, None],
    "alpha_pattern": [{"q_proj": 8}],
    "modules_to_save": [["lm_head"], "lm_head"],
    "trainable_token_indices": [[1]],
    "layer_replication": [[[0, 1]]],
    "alora_invocation_tokens": [[1, 2]],
    "target_parameters": [None, [], "x", ["experts.down_proj"], [1], 3, {"a": 1}],
    "target_modules": [None, [], "all-linear", [1]],
    "use_qalora": [True],
    "kasa_config": [{"beta": 1}],
    "base_model_name_or_path": ["nosuch/name", None, 3],
}  # fmt: skip


def _randomize(model):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)


@functools.cache
def bare(family):
    """A model without adapters, some weights packed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write(base(family, 1), path)
        config = None if family == "gpt_oss" else MXWeightOnlyConfig()
        return from_pretrained(path, config=config)


@functools.cache
def adapted(family):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write(base(family, 1), path)
        config = None if family == "gpt_oss" else MXWeightOnlyConfig()
        model = from_pretrained(path, config=config)
    for wanted in (is_experts, lambda m, n: is_linear(m) and n.endswith(("q_proj", "o_proj"))):
        if any(wanted(*pair[::-1]) for pair in model.named_modules()):
            quantize_(model, LORA, filter_fn=wanted)
    _randomize(model)
    return model


@functools.cache
def adapter(family, layout):
    """An undamaged adapter's files, as PEFT has them under transformers 5 or 4."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted(family), folder)
        files = read(folder)
    return files if layout == 5 else files | {WEIGHTS: _as_v4(files[WEIGHTS])}


def _as_v4(content):
    experts, tensors = 4, {n: value_of(record) for n, record in tensors_in(content).items()}
    for name, a in list(tensors.items()):
        if ".experts." in name and "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            b = tensors[other]
            tensors[name] = b.view(-1, LORA.r, experts).permute(2, 1, 0).flatten(0, 1)
            tensors[other] = a.view(experts, LORA.r, -1).permute(2, 1, 0).flatten(1)
    return packed({name: record_of("F32", t.float()) for name, t in tensors.items()})


def sizes(family):
    """``{name: (PEFT's key, experts, out, in)}`` of what is adapted."""
    found = {}
    for name, module in adapted(family).named_modules():
        if isinstance(module, MXLoRALinear):
            found[f"{name}.weight"] = name, None, module.lora_B.shape[0], module.lora_A.shape[1]
        elif isinstance(module, MXLoRAExperts):
            for weight, key in (("gate_up_proj", f"{name}.base_layer"), ("down_proj", name)):
                shape = getattr(bare(family).get_submodule(name), weight).shape
                e, n, k = (shape[0], *reversed(shape[1:])) if module.layout.transposed else shape
                found[f"{name}.{weight}"] = key, e, n, k
    return found


def expected(model, family, folder):
    """``{name: (A, B)}`` of the folder ``folder``, to be added with ``scaling``."""
    said = SaidAdapter(folder)
    return said, said.updates(sizes(family))


def run_load(folder, family):
    model = adapted(family)
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for p in parameters.values():
            p.fill_(0.25)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    try:
        load_adapter(model, folder)
    except Exception as error:
        changed = [n for n, p in parameters.items() if not equal(p, before[n])]
        return error, f"refused, and {changed[0]} changed" if changed else ""
    try:
        said, updates = expected(model, family, folder)
    except Unreadable as why:
        return None, f"loaded though {why}"
    if (said.r, said.scaling) != (LORA.r, LORA.scaling):
        return None, f"loaded with rank {said.r} and scaling {said.scaling}"
    for name, pair in updates.items():
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        for side, value in zip("AB", pair, strict=True):
            parameter = parameters[f"{stem}lora_{side}"]
            if not equal(parameter, value.to(parameter.dtype)):
                return None, f"{stem}lora_{side} has other values than the file"
    return None, ""


def run_merge(folder, family):
    model = copy.deepcopy(bare(family))  # whose packed bytes are replaced in place
    before = {n: values(p) for n, p in model.named_parameters()}
    try:
        merge_adapter(model, folder)
    except Exception as error:
        changed = [n for n, p in model.named_parameters() if not equal(values(p), before[n])]
        return error, f"refused, and {changed[0]} changed" if changed else ""
    after = {n: values(p) for n, p in model.named_parameters()}
    try:
        said, updates = expected(model, family, folder)
    except Unreadable as why:
        return None, f"merged though {why}"
    return None, merge_problem(before, after, updates, said.scaling, model)


def values(parameter):
    return (
        parameter.detach().dequantize(torch.float32)
        if hasattr(parameter, "qdata")
        else parameter.detach().clone()
    )


def merge_problem(before, after, updates, scaling, model):
    """What is wrong with the weights ``after``, of which rounding to 4 bits may take a quarter."""
    for name, old in before.items():
        if name not in updates:
            if not equal(after[name], old):
                return f"{name} changed, and has no adapter"
            continue
        a, b = (t.double() for t in updates[name])
        delta = scaling * (b @ a)
        wanted = old.double() + (delta.mT if transposed(model, name) else delta)
        difference = (after[name].double() - wanted).norm() / wanted.norm()
        if not difference < 0.25:
            return f"{name}: merged to something {difference:.2f} away"
    return ""


def transposed(model, name):
    module = model.get_submodule(name.rpartition(".")[0])
    return bool(getattr(module, "is_transposed", False))


RUNS = {"load": run_load, "merge": run_merge}


def run(folder, action, family, layout, mutations):
    original = adapter(family, layout)
    files = mutated(original, mutations)
    path = folder / "adapter"
    (folder / OUTSIDE).write_bytes(original[WEIGHTS])
    locked = write(files, path)
    with _fuzz.listening(), _fuzz.unprivileged(folder, locked):
        error, problem = RUNS[action](path, family)
    if problem:
        return _fuzz.Verdict("wrong load", problem)
    if error is None:
        return _fuzz.Verdict(_fuzz.LOADED)
    return _fuzz.judge_refusal(error, names_in(original) | names_in(files) | set(sizes(family)))


def mutations(files):
    says = st.sampled_from(sorted(SAYS)).flatmap(
        lambda k: one("nested", CONFIG, k, st.sampled_from(SAYS[k]))
    )
    return st.one_of(
        on_tensors(files), on_tensors(files), says, on_json(files, CONFIG), on_files(files)
    )


_CASES = [
    (action, family, layout)
    for action in RUNS
    for family, layout in (("gpt_oss", 5), ("gpt_oss", 4), ("llama", 5))
]


def cases():
    def of(which):
        return several(mutations(adapter(*which[1:]))).map(lambda drawn: (*which, drawn))

    return st.sampled_from(_CASES).flatmap(of)


def test_adapters(request):
    _fuzz.fuzz(request, run, cases(), examples=25)


@pytest.mark.parametrize("which", _CASES, ids=str)
def test_undamaged(which):
    assert _fuzz.once(run, *which, ()) == _fuzz.Verdict(_fuzz.LOADED)


@pytest.mark.parametrize("action", RUNS)
def test_an_adapter_that_the_config_names_is_missing(action):
    key = "base_model.model.model.layers.0.self_attn.o_proj"
    gone = [("drop", WEIGHTS, f"{key}.lora_{side}.weight") for side in "AB"]
    verdict = _fuzz.once(run, action, "llama", 5, gone)
    assert verdict.kind == _fuzz.REFUSED and "layers.0.self_attn.o_proj" in verdict.text
