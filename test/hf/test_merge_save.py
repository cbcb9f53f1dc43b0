"""save_pretrained(merge_adapters=True): stock transformers reloads Q(W + D), and the model stays as it was."""

import math
import shutil
import warnings

import pytest
import torch
from torchao.quantization import quantize_

pytest.importorskip("transformers")
pytest.importorskip("peft")
from safetensors.torch import load_file
from test_load import config_of, contents, stock, tensors_of, write
from test_merge import (
    EXPERTS,
    QUERIES,
    R,
    decoded,
    figures,
    quantized,
    randomize,
    update_of,
    with_our_adapters,
)
from test_save import assert_same, saved_tensors

from torchao_mx import (
    MXLoRALinear,
    MXWeightOnlyLoRAConfig,
    is_experts,
)
from torchao_mx.hf import from_pretrained, merge_adapter, save_adapter, save_pretrained


@pytest.fixture(params=[96, 64], ids=["I96", "square"])
def folder(request, tmp_path):
    config = config_of(request.param)
    return write(tmp_path / "model", config, tensors_of(config))


@pytest.mark.parametrize("shard", ["5GB", "20kb"], ids=["one_file", "sharded"])
def test_saved_merged(folder, shard, tmp_path):
    """Reloaded by stock transformers to Q(W + D); the model as it was."""
    model = with_our_adapters(from_pretrained(folder))
    save_adapter(model, tmp_path / "adapter")
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    base = {n: model.get_parameter(n).dequantize(torch.float32).double() for n in EXPERTS + QUERIES}
    errors = save_pretrained(model, tmp_path / "target", max_shard_size=shard, merge_adapters=True)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])

    assert errors.keys() == {*EXPERTS, *QUERIES}
    tensors, reloaded = saved_tensors(tmp_path / "target"), stock(tmp_path / "target")
    untouched = load_file(folder / "model.safetensors")
    assert tensors.keys() == untouched.keys()
    for name in EXPERTS:
        delta = update_of(tmp_path / "adapter", name)
        want = quantized(base[name] + delta)
        got = [tensors.pop(name + suffix) for suffix in ("_blocks", "_scales")]
        assert all(map(torch.equal, got, want))
        assert torch.equal(reloaded.get_parameter(name).double(), decoded(*want))
        assert errors[name] == pytest.approx(
            figures(decoded(*want), base[name] + delta, delta), rel=1e-6
        )
    for name in QUERIES:
        delta = update_of(tmp_path / "adapter", name)
        want = (base[name] + delta).float().bfloat16()
        assert torch.equal(tensors.pop(name), want)
        assert torch.equal(reloaded.get_parameter(name), want.float())
        assert errors[name] == pytest.approx(figures(want, base[name] + delta, delta), rel=1e-6)
    assert_same(tensors, {n: untouched[n] for n in tensors})


def test_saved_merged_is_what_merging_the_file_gives(folder, tmp_path):
    """For experts, which alone are packed in both."""
    model = from_pretrained(folder)
    quantize_(model, MXWeightOnlyLoRAConfig(r=R, lora_alpha=8), filter_fn=is_experts)
    save_adapter(randomize(model), tmp_path / "adapter")
    errors = save_pretrained(model, tmp_path / "a", merge_adapters=True)
    plain = from_pretrained(folder)
    assert merge_adapter(plain, tmp_path / "adapter") == errors
    assert save_pretrained(plain, tmp_path / "b", merge_adapters=True) == {}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_linear_layers_that_are_merged_already(folder, tmp_path):
    model = with_our_adapters(from_pretrained(folder))
    first = save_pretrained(model, tmp_path / "a", merge_adapters=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, MXLoRALinear)
    layer.merge()
    merged = layer.weight.detach().clone()
    assert save_pretrained(model, tmp_path / "b", merge_adapters=True) == first
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert torch.equal(saved_tensors(tmp_path / "b")[QUERIES[0]], merged) and layer.merged


def test_saves_that_are_refused(folder, tmp_path):
    target = tmp_path / "target"
    save_pretrained(from_pretrained(folder), target)
    before = contents(tmp_path)

    def refuse(model, message, **options):
        with pytest.raises(ValueError, match=message):
            save_pretrained(model, target, **options)
        assert contents(tmp_path) == before
        assert {f.name for f in tmp_path.iterdir()} == {"model", "target"}

    model = with_our_adapters(from_pretrained(folder))
    refuse(model, "gate_up_proj_lora_A: .*merge_adapters=True.*save_adapter")
    merging = {"merge_adapters": True}
    with torch.no_grad():
        model.get_parameter(f"{EXPERTS[2]}_lora_B")[1, 0, 0] = math.nan
    refuse(model, rf"{EXPERTS[2]}: lora_A of up to .* and lora_B of up to nan", **merging)
    randomize(model)
    with torch.no_grad():  # finite, and their product is not
        model.get_parameter(f"{EXPERTS[2]}_lora_A").fill_(3e38)
        model.get_parameter(f"{EXPERTS[2]}_lora_B").fill_(3e38)
    refuse(model, rf"{EXPERTS[2]}: lora_A of up to 3\.0\d*e\+38", **merging)
    randomize(model)
    model.extra = MXLoRALinear(64, 64, config=MXWeightOnlyLoRAConfig(r=R))
    refuse(model, r"extra\.weight: .* no such tensor", **merging)
    del model.extra
    eight_bit = stock(folder)
    quantize_(
        eight_bit, MXWeightOnlyLoRAConfig(r=R, dtype=torch.float8_e4m3fn), filter_fn=is_experts
    )
    refuse(eight_bit, r"gate_up_proj: MXTensor.*mxfp8", **merging)
    shutil.copytree(target, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has an adapter_config\.json"):
        save_pretrained(model, tmp_path / "adapter", merge_adapters=True)


def test_a_tied_head_with_adapters_would_be_lost(tmp_path):
    config = config_of(tie_word_embeddings=True)
    tensors = tensors_of(config)
    del tensors["lm_head.weight"]
    model = from_pretrained(write(tmp_path / "model", config, tensors))
    quantize_(model, MXWeightOnlyLoRAConfig(r=R), filter_fn=lambda m, n: n == "lm_head")
    with pytest.raises(
        ValueError, match=r"lm_head\.weight: has adapters, but model.config ties it"
    ):
        save_pretrained(model, tmp_path / "target", merge_adapters=True)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("scale", [1, 1e-4], ids=["kept", "lost"])
def test_a_lost_update_is_warned_of(scale, tmp_path):
    config = config_of()
    model = from_pretrained(write(tmp_path / "model", config, tensors_of(config)))
    model = with_our_adapters(model)
    with torch.no_grad():
        model.get_parameter(f"{EXPERTS[2]}_lora_B").mul_(scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors = save_pretrained(model, tmp_path / "target", merge_adapters=True)
    texts = [str(w.message) for w in caught if "rounding undoes" in str(w.message)]
    if scale == 1:
        assert not texts and min(e.kept for e in errors.values()) > 0.3
    else:
        assert len(texts) == 1 and f"1 of {len(errors)} weights; serve the adapter" in texts[0]
        assert texts[0].endswith(f"\n{EXPERTS[2]}: 0.0 % is kept")
        assert errors[EXPERTS[2]].kept == 0
