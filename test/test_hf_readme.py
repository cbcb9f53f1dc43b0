"""The README's examples of checkpoints, on a tiny one."""

import json
import pathlib
import re

import pytest

pytest.importorskip("transformers")

from test_hf_load import config_of, tensors_of, write

README = pathlib.Path(__file__).parents[1] / "README.md"
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


def test_fine_tuning_with_trl(run, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    import datasets
    from test_hf_trl import SENTENCES, tokenizer

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
