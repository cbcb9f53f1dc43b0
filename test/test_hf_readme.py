"""The README's example of a checkpoint, on a tiny one."""

import pathlib
import re

import pytest

pytest.importorskip("transformers")

from test_hf_load import config_of, tensors_of, write

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "torchao_mx.hf" in block)
    config = config_of(96)
    write(tmp_path / "model", config, tensors_of(config))
    monkeypatch.chdir(tmp_path)
    code = example.replace("openai/gpt-oss-20b", "model").replace(
        'device_map="auto"', 'device_map="cpu"'
    )
    exec(code, {})
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "copy" / "model.safetensors").is_file()
