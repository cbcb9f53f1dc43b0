"""The README's examples of checkpoints, on a tiny one."""

import json
import os
import pathlib
import re

import pytest

pytest.importorskip("transformers")

from _ranks import run_ranks
from test_load import config_of, tensors_of, write

README = pathlib.Path(__file__).parents[2] / "README.md"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def example(marker):
    """The README's example that has ``marker`` in it."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if marker in block)
    return code


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example with a tiny model in the place of gpt-oss-20b, on the CPU."""
    config = config_of(96)
    write(tmp_path / "model", config, tensors_of(config))
    monkeypatch.chdir(tmp_path)

    def run_it(marker, **replaced):
        code = example(marker)
        replaced |= {"openai/gpt-oss-20b": "model", 'device_map="auto"': 'device_map="cpu"'}
        for old, new in replaced.items():
            assert old in code
            code = code.replace(old, new)
        names = {}
        exec(code, names)
        return names

    return run_it


def test_the_example_runs(run, tmp_path):
    run("save_pretrained(")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == ADAPTER
    assert (tmp_path / "copy" / "model.safetensors").is_file()


STEP = """\
ids = torch.randint(3, 90, (2, 12))
model(input_ids=ids, labels=ids).loss.backward()
norm = clip_grad_norm_(model.parameters(), 1.0)
#"""


def train_on_ranks(device, folder):
    """The README's script for eight GPUs, on four CPU ranks, with a step of training in it."""
    os.chdir(folder)
    factor = "layer.mlp.experts.set_gradient_divide_factor"
    replaced = {
        'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))': "",
        'init_device_mesh("cuda", (2, 4)': 'init_device_mesh("cpu", (2, 2)',
        'init_device_mesh("cuda", (8,))': 'init_device_mesh("cpu", (4,))',
        '"openai/gpt-oss-120b", device_map="cuda"': '"model"',
        # gloo does not scale while it sums
        f"{factor}(8)": f"{factor}(4); layer.mlp.experts.set_force_sum_reduction_for_comms(True)",
        "...  # train;": STEP,
    }
    code, names = example("init_device_mesh"), {}
    for old, new in replaced.items():
        assert old in code, old
        code = code.replace(old, new)
    exec(code, names)
    trained = [p for p in names["model"].parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained) and names["norm"] > 0
    return len(trained)


def test_many_gpus(run, tmp_path):
    trained = run_ranks(train_on_ranks, 4, str(tmp_path))
    assert trained == [2 * 2 * 2] * 4  # A and B of two weights in two layers
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == ADAPTER


def test_fine_tuning_with_trl(run, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    import datasets
    from test_trl import SENTENCES, tokenizer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    words.save_pretrained(tmp_path / "model")
    question, answer = SENTENCES
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 8)
    names = run(
        "SFTTrainer", **{'output_dir="run"': 'output_dir="run", use_cpu=True, report_to=[]'}
    )
    assert names["trainer"].state.global_step > 0
    assert {file.name for file in (tmp_path / "tuned").iterdir()} >= ADAPTER
    trained = [name for name, _ in names["model"].named_parameters() if "lora_" in name]
    assert len(trained) == 2 * 2 * (4 + 2)  # A and B in two layers: of attention, of experts
