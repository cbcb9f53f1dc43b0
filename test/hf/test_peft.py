"""PEFT's adapters on packed experts, unpatched: the gradients of the same adapters on the dequantized model."""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from _grids import generator, relative_error
from test_load import (
    V5,
    WEIGHTS,
    config_of,
    experts_of,
    gradients,
    inputs,
    stock,
    tensors_of,
    write,
)

from torchao_mx import MXTensor, ops
from torchao_mx.hf import from_pretrained, save_pretrained

TARGETS = [f"mlp.experts.{name}" for name in WEIGHTS]


@pytest.fixture(params=[96, 64], ids=["I96", "square"])
def folder(request, tmp_path):
    config = config_of(request.param)
    return write(tmp_path / "model", config, tensors_of(config))


def adapted(model, targets=TARGETS, seed=4):
    """``model`` with adapters that are not zero, equal for equal seeds."""
    config = peft.LoraConfig(target_parameters=targets, r=4, lora_alpha=8, target_modules=[])
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator(seed)))
                seed += 1
    return model


def dequantized(folder):
    model = stock(folder)
    if not V5:  # the layout that PEFT gives adapters under v5, and on our model under both
        for module in experts_of(model):
            module.is_transposed = True
    return model


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])  # fmt: skip
def test_gradients_are_those_on_the_dequantized_model(folder, targets):
    got = adapted(from_pretrained(folder, dtype=torch.float32), targets)
    want = adapted(dequantized(folder), targets)
    with torch.no_grad():
        assert relative_error(got(inputs()).logits, want(inputs()).logits) < 1e-5
    got, want = gradients(got), gradients(want)
    assert got.keys() == want.keys() and len(got) == 2 * 2 * len(targets)
    assert all(relative_error(got[name], grad) < 1e-4 for name, grad in want.items())


def test_it_goes_through_the_fused_op(folder, monkeypatch):
    model = adapted(from_pretrained(folder))
    calls = []
    fused = ops.lora_grouped_mm
    monkeypatch.setattr(ops, "lora_grouped_mm", lambda *a, **k: calls.append(0) or fused(*a, **k))
    monkeypatch.setattr(MXTensor, "dequantize", None)
    gradients(model)
    assert len(calls) == 2 * 2  # products of each layer


def test_training_lowers_the_loss_and_leaves_the_weights(folder):
    model = adapted(from_pretrained(folder))
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, MXTensor)}
    before = {n: p.qdata.clone() for n, p in packed.items()}
    assert len(packed) == 2 * 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(inputs(), labels=inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(packed[n].qdata, q) for n, q in before.items())


def test_adapters_are_saved_by_peft_and_not_by_us(folder, tmp_path):
    model = adapted(from_pretrained(folder))
    with pytest.raises(TypeError, match=r"PeftModel.*unload"):
        save_pretrained(model, tmp_path / "whole")
    with pytest.raises(ValueError, match="unload adapters"):
        save_pretrained(model.base_model.model, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(again(inputs()).logits, model(inputs()).logits)
    plain = model.unload()
    save_pretrained(plain, tmp_path / "whole")
    assert torch.equal(
        from_pretrained(tmp_path / "whole")(inputs()).logits, from_pretrained(folder)(inputs()).logits
    )  # fmt: skip


def test_adapters_that_transformers_adds(folder, tmp_path):
    """``model.add_adapter``, and transformers' save_pretrained, which then writes the adapter alone."""
    config = peft.LoraConfig(target_parameters=TARGETS, r=4, target_modules=[])
    model = from_pretrained(folder)
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "adapter")
    files = {f.name for f in (tmp_path / "adapter").glob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "bare"])
def test_trainer_takes_it(folder, adapters, tmp_path):
    pytest.importorskip("accelerate")
    model = from_pretrained(folder, dtype=torch.float32)
    model = adapted(model) if adapters else model
    args = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_steps=2, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in inputs(4)]
    trainer = transformers.Trainer(model=model, args=args, train_dataset=data)
    assert trainer.train().training_loss > 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with torch.no_grad():
        want = model.eval()(inputs()).logits
        if adapters:
            again = from_pretrained(folder, dtype=torch.float32)
            again = peft.PeftModel.from_pretrained(again, checkpoint)
        else:
            again = from_pretrained(checkpoint, dtype=torch.float32)
        assert torch.equal(again(inputs()).logits, want)
