"""The writer: every source in a layout that only this file knows."""

import json
import types

import pytest
import torch

pytest.importorskip("transformers")
import torch.distributed.checkpoint as dcp
from test_cli import write_unpacked
from test_load import config_of, tensors_of, write
from test_save import saved_tensors

from torchao_mx import MXTensor, ScaleCalculationMode
from torchao_mx.hf import from_pretrained
from torchao_mx.hf.layouts import gpt_oss
from torchao_mx.hf.quantize import folder_source
from torchao_mx.hf.save import model_source
from torchao_mx.hf.save_sharded import sharded_source
from torchao_mx.hf.write import write as write_checkpoint

LIMIT = 30_000


def stored(name, tensor):
    """The tensors of each expert by themselves, as many engines have them."""
    if not isinstance(tensor, MXTensor):
        return {name: tensor}
    stem, _, weight = name.rpartition(".")
    blocks, scales = tensor.mT.to_blocks()
    return {
        f"{stem}.{e}.{weight}.{kind}": part
        for e, pair in enumerate(zip(blocks.flatten(-2), scales, strict=True))
        for kind, part in zip(("weight_packed", "weight_scale"), pair, strict=True)
    }


LAYOUT = types.SimpleNamespace(
    NAME="a layout of experts by themselves",
    packed_weights=gpt_oss.packed_weights,
    empty=gpt_oss.empty,
    stored=stored,
    weight_problems=gpt_oss.weight_problems,
    quantization_config=lambda loaded=None: {"quant_method": "by themselves"},
)


def source_of(kind, folder):
    """(the source, the checkpoint in gpt-oss's layout with the same tensors)."""
    config = config_of()
    if kind == "folder":
        unpacked = write_unpacked(folder / "unpacked", config)
        source = folder_source(unpacked, ScaleCalculationMode.RCEIL, [])
    else:
        model = from_pretrained(write(folder / "packed", config, tensors_of(config)))
        source = model_source(model, {}, {})
    if kind == "ranks":
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)
        source = sharded_source(folder / "dcp", config, "model.", None)
    write_checkpoint(source, gpt_oss, folder / "published", 10**9)
    return source, saved_tensors(folder / "published")


@pytest.mark.parametrize("kind", ["model", "ranks", "folder"])
def test_a_layout_of_ones_own(kind, tmp_path):
    source, published = source_of(kind, tmp_path)
    write_checkpoint(source, LAYOUT, tmp_path / "target", LIMIT)
    found = saved_tensors(tmp_path / "target")
    record = json.loads((tmp_path / "target" / "config.json").read_text())
    assert record["quantization_config"] == {"quant_method": "by themselves"}
    weights = gpt_oss.packed_weights(source.model)
    experts = 0
    for name in weights:
        stem, _, weight = name.rpartition(".")
        blocks, scales = published.pop(f"{name}_blocks"), published.pop(f"{name}_scales")
        for e in range(len(blocks)):
            assert torch.equal(
                found.pop(f"{stem}.{e}.{weight}.weight_packed"), blocks[e].flatten(-2)
            )
            assert torch.equal(found.pop(f"{stem}.{e}.{weight}.weight_scale"), scales[e])
            experts += 1
    assert experts == 16
    assert found.keys() == published.keys()
    assert all(torch.equal(t, published[name]) for name, t in found.items())
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "target").glob("*.safetensors")}
    assert len(sizes) > 3 and all(size < LIMIT + 4_096 for size in sizes.values()), sizes


def test_what_is_read_is_checked(tmp_path):
    """Of a source that is not in memory, as late as it is drawn; the target stays as it was."""
    model = from_pretrained(write(tmp_path / "packed", config_of(), tensors_of(config_of())))
    source = model_source(model, {}, {})
    name = gpt_oss.packed_weights(model)[-1]

    def read(wanted):
        tensor = source.read(wanted)
        return tensor.dequantize() if wanted == name else tensor

    late = source._replace(what="a source", read=read)
    with pytest.raises(
        ValueError, match=rf"^a source cannot be saved in a layout.*:\n{name}: a plain"
    ):
        write_checkpoint(late, LAYOUT, tmp_path / "target", LIMIT)
    assert not (tmp_path / "target").exists()
