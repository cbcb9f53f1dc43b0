"""TRL's SFTTrainer and transformers' Trainer on packed experts, with our adapters and with PEFT's, unpatched."""

# ruff: noqa: E402  the imports after importorskip need what it asks for

import pytest
import torch
from torchao.quantization import quantize_

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
from safetensors.torch import load_file
from test_load import WEIGHTS, config_of, inputs, tensors_of, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from torchao_mx import MXTensor, MXWeightOnlyLoRAConfig, is_experts
from torchao_mx.hf import from_pretrained, load_adapter, save_adapter

OPTIONS = {
    "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
    "save_steps": 3, "report_to": [], "use_cpu": True, "bf16": False,
}  # fmt: skip
PEFT_CONFIG = peft.LoraConfig(
    r=4, lora_alpha=8, target_modules=[], target_parameters=[f"mlp.experts.{n}" for n in WEIGHTS]
)
SENTENCES = ["the cat sat on the mat", "a dog ran to a hat"]


@pytest.fixture
def folder(tmp_path):
    config = config_of()
    return write(tmp_path / "model", config, tensors_of(config))


def tokenizer():
    """Of the sentences' words, with the ids of ``config_of`` for padding and the end."""
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(" ".join(SENTENCES).split()))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    splitting = Tokenizer(model)
    splitting.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=splitting, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def packed(folder):
    return from_pretrained(folder, dtype=torch.float32)


def adapted(folder):
    """With our adapters, the only parameters that are trained."""
    model = packed(folder).requires_grad_(False)
    quantize_(model, MXWeightOnlyLoRAConfig(r=4, lora_alpha=8), filter_fn=is_experts)
    return model


def sft_trainer(model, out, peft_config=None, **options):
    """For few steps, of two sentences."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(out), **OPTIONS | options),
        train_dataset=Dataset.from_dict({"text": SENTENCES * 8}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def train(trainer, **options):
    """Train; the loss must fall, all adapters change, and nothing else, packed bytes included."""
    state = {n: values(p) for n, p in trainer.model.named_parameters()}
    trainer.train(**options)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    packed = 0
    for name, p in trainer.model.named_parameters():
        assert torch.equal(values(p), state[name]) == ("lora_" not in name), name
        packed += isinstance(p, MXTensor)
    assert packed == 2 * 2
    return trainer.model.eval()


def values(parameter):
    return getattr(parameter, "qdata", parameter).detach().clone()


def logits(model):
    with torch.no_grad():
        return model(inputs()).logits


def test_sft_with_our_adapters(folder, tmp_path):
    trainer = sft_trainer(adapted(folder), tmp_path / "run", save_strategy="no")
    model = train(trainer)
    save_adapter(model, tmp_path / "adapter")
    again = adapted(folder)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_sft_with_pefts_adapters(folder, tmp_path):
    """PEFT's own saving, of the adapter and of checkpoints, which training goes on from."""
    trainer = sft_trainer(packed(folder), tmp_path / "run", peft_config=PEFT_CONFIG)
    model = train(trainer)
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(packed(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    trainer = sft_trainer(packed(folder), tmp_path / "run", peft_config=PEFT_CONFIG)
    resumed = train(trainer, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert torch.equal(logits(resumed), logits(model))


def test_checkpoints_of_our_adapters_are_resumed_from(folder, tmp_path):
    """transformers' Trainer saves every three steps; it warns of what is not in a checkpoint."""

    def trainer():
        rows = [{"input_ids": row, "labels": row} for row in inputs()] * 8
        args = TrainingArguments(str(tmp_path / "run"), **OPTIONS)
        return Trainer(model=adapted(folder), args=args, train_dataset=rows)

    with pytest.warns(UserWarning, match="saved as its adapters alone"):
        model = train(trainer())
    checkpoint = tmp_path / "run" / "checkpoint-3"
    saved = load_file(checkpoint / "model.safetensors")
    assert len(saved) == 8 and all("_lora_" in name for name in saved)
    resumed = train(trainer(), resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(resumed), logits(model))
