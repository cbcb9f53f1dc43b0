"""Saves that are killed at a file operation: the old checkpoint loads or the new one, and the next save succeeds.

``--kills 1000`` kills at every operation.
"""

import errno
import itertools
import json
import shutil
import subprocess

import pytest
import torch

pytest.importorskip("transformers")
from _children import CHANGES, Killed, in_child
from safetensors.torch import load_file
from test_cli import write_unpacked
from test_load import config_of, stock, tensors_of, write
from torch import nn
from torchao.quantization import quantize_

from torchao_mx import MXTensor, MXWeightOnlyLoRAConfig
from torchao_mx.hf import cli, from_pretrained, save_adapter, save_pretrained, staging
from torchao_mx.hf.adapter import read_adapter

ENDLESS = 10**6  # more operations than there are
SHARDED = "30KB"


def names_in(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


def picked(operations, kills):
    """Numbers of the operations to kill at: all of them, or a few of those that change the folder."""
    if kills >= len(operations):
        return range(len(operations))
    changes = [i for i, name in enumerate(operations) if name in CHANGES]
    return [changes[(2 * i + 1) * len(changes) // (2 * kills)] for i in range(kills)]


def kill_everywhere(save, prepare, check, folder, kills):
    """Kill ``save`` at ``kills`` operations, each time in a folder that ``prepare`` has filled."""
    prepare()
    result, operations = in_child(save, kill_at=ENDLESS)
    assert not isinstance(result, BaseException), result
    names = names_in(folder)
    seen = set()
    for n in picked(operations, kills):
        prepare()
        with pytest.raises(Killed):
            in_child(save, kill_at=n)
        seen.add(check())
        in_child(save)  # what is left does not disturb the next one
        assert names_in(folder) == names, n
        assert check([from_pretrained]) == "new"
    assert seen <= {"old", "new"}, seen
    return seen


# --- checkpoints ----------------------------------------------------------------------------------


def values_of(model):
    values = {
        n: t.dequantize() if isinstance(t, MXTensor) else t for n, t in model.state_dict().items()
    }
    return model.config.sliding_window, values


def same(a, b):
    return a[0] == b[0] and all(torch.equal(t, b[1][n]) for n, t in a[1].items())


@pytest.fixture
def checkpoints(tmp_path):
    """(config, tensors) of an old and a new one, which differ in both."""
    configs = config_of(), config_of()
    for config, window in zip(configs, (8, 16), strict=True):
        config.update({"num_hidden_layers": 1, "layer_types": ["full_attention"]})
        config.sliding_window = window
    return {
        which: (config, tensors_of(config, seed))
        for which, config, seed in zip(("old", "new"), configs, (0, 1), strict=True)
    }


def empty(folder):
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def checker(target, values):
    """Which checkpoint is in ``target``, as transformers and as from_pretrained read it."""

    def check(readers=(lambda path: stock(path, torch.bfloat16), from_pretrained)):
        if "old" not in values and not (target / "config.json").exists():
            return "old"  # nothing, as before
        found = [values_of(read(target)) for read in readers]
        (name,) = (w for w, v in values.items() if all(same(f, v) for f in found))
        return name

    return check


TRANSITIONS = {
    "single_to_single": (1, "5GB"),
    "single_to_sharded": (1, SHARDED),
    "sharded_to_single": (3, "5GB"),
    "sharded_to_fewer": (SHARDED, "50KB"),
    "sharded_to_same_names": (SHARDED, SHARDED),
    "new_folder": (None, SHARDED),
}


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_a_checkpoint_is_the_old_one_or_the_new(transition, checkpoints, tmp_path, kills):
    before, after = TRANSITIONS[transition]
    place = tmp_path / "place"
    place.mkdir()
    target = place / "target"
    models = {w: from_pretrained(write(tmp_path / w, *checkpoints[w])) for w in ("old", "new")}
    values = {w: values_of(models[w]) for w in (("old", "new") if before else ("new",))}

    def prepare():
        empty(place)
        if isinstance(before, int):
            write(target, *checkpoints["old"], before)
        elif before is not None:
            save_pretrained(models["old"], target, max_shard_size=before)
        if before is not None:
            (target / "tokenizer.json").write_text("{}")

    seen = kill_everywhere(
        lambda: save_pretrained(models["new"], target, max_shard_size=after),
        prepare,
        checker(target, values),
        place,
        kills,
    )
    assert seen == {"old", "new"} or before is None or kills == 1


def test_quantize_leaves_the_old_one_or_the_new(checkpoints, tmp_path, kills):
    place = tmp_path / "place"
    place.mkdir()
    target = place / "target"
    source = write_unpacked(tmp_path / "source", checkpoints["new"][0], "80KB")
    command = ["quantize", str(source), str(target), "--max-shard-size", SHARDED]
    assert in_child(lambda: cli.main(command))[0] == 0
    values = {"new": values_of(from_pretrained(target))}
    empty(place)
    values["old"] = values_of(from_pretrained(write(target, *checkpoints["old"])))

    def prepare():
        empty(place)
        write(target, *checkpoints["old"])

    check = checker(target, values)
    assert kill_everywhere(lambda: cli.main(command), prepare, check, place, kills) == {
        "old",
        "new",
    }


# --- adapters -------------------------------------------------------------------------------------


def adapted(alpha, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, MXWeightOnlyLoRAConfig(r=4, lora_alpha=alpha))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    return model


@pytest.mark.parametrize("alphas", [(8, 16), (8, 8)], ids=["other_scale", "same_scale"])
def test_an_adapter_is_the_old_one_or_the_new(alphas, tmp_path, kills):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "place"
    folder.mkdir()
    models = [adapted(alpha, seed) for seed, alpha in enumerate(alphas)]

    def figures(config, tensors):
        return config["lora_alpha"], {k: t.tolist() for k, t in tensors.items()}

    def prepare():
        empty(folder)
        save_adapter(models[0], folder)

    known = {}
    for name, model in zip(("old", "new"), models, strict=True):
        save_adapter(model, folder)
        known[name] = figures(*read_adapter(folder))

    def check(readers=None):
        # PEFT may refuse, but never takes one's weights under the other's scale.
        if "INTERRUPTED_SAVE" in (folder / "adapter_config.json").read_text():
            with pytest.raises((KeyError, ValueError), match="INTERRUPTED_SAVE"):
                peft.PeftConfig.from_pretrained(folder)
        else:
            config = peft.PeftConfig.from_pretrained(folder)
            weights = load_file(folder / "adapter_model.safetensors")
            assert figures({"lora_alpha": config.lora_alpha}, weights) in known.values()
        (name,) = (n for n, v in known.items() if v == figures(*read_adapter(folder)))
        return name

    seen = kill_everywhere(
        lambda: save_adapter(models[1], folder), prepare, check, folder, max(kills, 4)
    )
    assert seen == {"old", "new"}


# --- disks that are full or read-only -------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 600 KB, where that may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("shard", ["5GB", SHARDED], ids=["single", "sharded"])
def test_kills_on_a_disk_that_is_full_or_read_only(shard, checkpoints, disk, tmp_path, kills):
    """Killed, the folder is first written to where there is no room, then where nothing may be written."""
    models = {w: from_pretrained(write(tmp_path / w, *checkpoints[w])) for w in ("old", "new")}
    check = checker(disk, {w: values_of(m) for w, m in models.items()})

    def prepare():
        empty(disk)
        write(disk, *checkpoints["old"])

    def save():
        save_pretrained(models["new"], disk, max_shard_size=shard)

    def unchecked():
        staging._check_space = lambda *arguments: None
        save()

    prepare()
    _, operations = in_child(save, kill_at=ENDLESS)
    names = names_in(disk)
    for n, full in zip(picked(operations, kills), itertools.cycle([save, unchecked])):
        prepare()
        with pytest.raises(Killed):
            in_child(save, kill_at=n)
        which = check()
        staging.clean(disk)  # as the next save does, to have as much room again
        assert check([from_pretrained]) == which
        with (disk / "filler").open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 40_960))
        error, _ = in_child(full)
        assert error.errno == errno.ENOSPC and error.filename == str(disk), error
        assert check([from_pretrained]) == which and not list(disk.glob(".torchao*"))
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        error, _ = in_child(save)
        assert isinstance(error, PermissionError) and error.filename == str(disk)
        assert check([from_pretrained]) == which
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        assert in_child(save)[0] is None
        assert check([from_pretrained]) == "new" and names_in(disk) == names


def test_the_config_of_a_killed_save_is_not_copied(checkpoints, tmp_path):
    """Whose key names files of its own folder."""
    source = write_unpacked(tmp_path / "source", config_of())
    (source / "model.safetensors").rename(source / "model-saving-00000000.safetensors")
    record = json.loads((source / "config.json").read_text())
    record["transformers_weights"] = "model-saving-00000000.safetensors"
    (source / "config.json").write_text(json.dumps(record))
    assert cli.main(["quantize", str(source), str(tmp_path / "target")]) == 0
    assert "transformers_weights" not in (tmp_path / "target" / "config.json").read_text()
    from_pretrained(tmp_path / "target")
