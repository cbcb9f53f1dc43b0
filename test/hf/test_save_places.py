"""Where everything that saves can write, and what it says of where it cannot: nothing is changed there, or lost."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import torch.distributed.checkpoint as dcp
from _children import NOBODY, in_child
from safetensors import SafetensorError
from test_cli import write_unpacked
from test_kill import adapted, disk, names_in
from test_load import config_of, contents, tensors_of, write

from torchao_mx.hf import (
    cli,
    from_pretrained,
    load_adapter,
    publish,
    save_adapter,
    save_distributed,
    save_pretrained,
    staging,
)

assert disk  # a fixture
CHECKPOINT = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What each writer writes, in a folder that other users may read."""
    folder = Path(tempfile.mkdtemp(prefix="torchao_mx-"))
    folder.chmod(0o755)
    config = config_of()
    config.update({"num_hidden_layers": 1, "layer_types": ["full_attention"]})
    model = from_pretrained(write(folder / "packed", config, tensors_of(config)))
    write_unpacked(folder / "unpacked", config)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    dcp.save(model.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)
    yield {"folder": folder, "config": config, "model": model, "adapted": adapted(8, 0)}
    shutil.rmtree(folder)


def command(*arguments):
    code = cli.main([str(a) for a in arguments])
    if code:
        raise SystemExit(code)


WRITERS = {
    "save_pretrained": lambda s, target: save_pretrained(s["model"], target),
    "sharded": lambda s, target: save_pretrained(s["model"], target, max_shard_size="30KB"),
    "save_distributed": lambda s, target: save_distributed(
        s["folder"] / "dcp", target, s["config"]
    ),
    "quantize": lambda s, target: command("quantize", s["folder"] / "unpacked", target),
    "save_adapter": lambda s, target: save_adapter(s["adapted"], target),
}


@pytest.fixture(params=WRITERS)
def writer(request, sources):
    """A function that saves into a folder."""
    write = WRITERS[request.param]
    save = lambda target: write(sources, target)  # noqa: E731
    save.name = request.param
    return save


@pytest.fixture
def place(tmp_path):
    """A folder that other users reach."""
    folder = Path(tempfile.mkdtemp(prefix="torchao_mx-"))
    folder.chmod(0o755)
    yield folder
    for entry in (folder, *folder.rglob("*")):
        if entry.is_dir():
            entry.chmod(0o755)
    shutil.rmtree(folder)


def as_user(function, **options):
    """Where permissions count, which is not so for root."""
    return in_child(function, user=NOBODY if os.geteuid() == 0 else None, **options)


def assert_saved(writer, folder):
    """What is read back, and that nothing else is there."""
    if writer.name == "save_adapter":
        load_adapter(adapted(8, 1), folder)
        assert set(names_in(folder)) >= ADAPTER
    else:
        from_pretrained(folder)
        assert (folder / "config.json").is_file()
    assert (
        len({f.stat().st_mode for f in folder.iterdir() if f.suffix in (".json", ".safetensors")})
        == 1
    )
    assert not [n for n in names_in(folder) if n.startswith(".") or "saving" in n]


# --- folders that can be written ------------------------------------------------------------------


def test_a_mount_point(writer, disk):
    for _ in range(2):
        writer(disk)
        assert_saved(writer, disk)


def test_the_parent_is_not_writable(writer, place):
    target = place / "target"
    target.mkdir()
    target.chmod(0o777)
    place.chmod(0o555)
    for _ in range(2):
        error, _ = as_user(lambda: writer(target))
        assert not isinstance(error, BaseException), error
        assert_saved(writer, target)
    assert names_in(place)[0] == "target" and {f.name for f in place.iterdir()} == {"target"}


def test_the_working_directory(writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        writer(".")
        assert Path.cwd() == tmp_path and os.path.samefile(".", tmp_path)
        assert_saved(writer, Path("."))


def test_links_stay_and_what_they_lead_to_is_not_written(writer, tmp_path):
    """A link to the folder, and files that are links, as in the Hub's cache."""
    real, blob = tmp_path / "real", tmp_path / "blob"
    real.mkdir()
    blob.write_text("others have this too")
    written = ADAPTER if writer.name == "save_adapter" else CHECKPOINT
    for name in (*written, "notes"):
        (real / name).symlink_to(blob)
    (tmp_path / "link").symlink_to(real)
    writer(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and blob.read_text() == "others have this too"
    assert not any((real / name).is_symlink() for name in written) and (real / "notes").is_symlink()
    assert_saved(writer, real)


def test_a_file_system_without_hard_links(writer, tmp_path, monkeypatch):
    def link(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        writer(tmp_path)
        assert_saved(writer, tmp_path)


# --- folders that cannot --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["folder", "parent"])
def test_a_folder_that_may_not_be_written_is_refused_before_anything_is(writer, which, place):
    target = place / "target" / "new" if which == "parent" else place / "target"
    (place / "target").mkdir()
    (place / "target" / "config.json").write_text("{}")
    (place / "target").chmod(0o555)
    error, operations = as_user(lambda: writer(target), kill_at=10**6)
    if writer.name == "quantize":
        assert isinstance(error, SystemExit) and error.code == 1
    else:
        assert isinstance(error, PermissionError) and error.filename == str(place / "target")
        assert "give another" in str(error)
    assert operations == [] and names_in(place) == ["target", "target/config.json"]


def test_a_read_only_file_system_is_refused(writer, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    result, operations = in_child(lambda: writer(disk), kill_at=10**6)
    assert isinstance(result, (PermissionError, SystemExit)) and operations == []


def test_a_file_or_a_folder_in_the_way(writer, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((ValueError, SystemExit), match=r"is a file|^1$"):
            writer(target)
    if writer.name != "save_adapter":
        (tmp_path / "target" / "model.safetensors").mkdir(parents=True)
        with pytest.raises((ValueError, SystemExit), match=r"is a folder in place of|^1$"):
            writer(tmp_path / "target")
        assert names_in(tmp_path / "target") == ["model.safetensors"]


def test_two_saves_at_once(writer, tmp_path):
    target = tmp_path / "target"
    writer(target)
    before = contents(target)
    with staging.staging(target, 0) as stage:
        with pytest.raises((BlockingIOError, SystemExit), match=r"another save .* under way|^1$"):
            writer(target)
        assert stage.is_dir()
    assert contents(target) == before
    writer(target)
    assert_saved(writer, target)


# --- what fails early, and disks that fail late ---------------------------------------------------


def never(*arguments, **options):
    raise AssertionError("weights are written before what can fail")


@pytest.mark.parametrize("name", ["save_pretrained", "sharded"])
def test_a_generation_config_that_cannot_be_saved(name, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "save_file", never)
    monkeypatch.setattr(sources["model"].generation_config, "do_sample", False)
    monkeypatch.setattr(sources["model"].generation_config, "temperature", 0.5)
    with pytest.raises(ValueError, match="Fix these issues to save the configuration"):
        WRITERS[name](sources, tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_seen_before_writing(writer, tmp_path, monkeypatch, capsys):
    target = tmp_path / "target"
    writer(target)
    before = contents(target)
    monkeypatch.setattr(staging, "save_file", never)
    usage = type(shutil.disk_usage(target))(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises((OSError, SystemExit)) as caught:
        writer(target)
    text = str(caught.value) if writer.name != "quantize" else capsys.readouterr().err
    assert re.search(r"\d\d bytes are needed and 1,000 are free; make room", text)
    assert str(target) in text and contents(target) == before


ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


@pytest.mark.parametrize(
    ("code", "existing"), [(code, True) for code in ERRORS] + [(errno.ENOSPC, False)]
)
def test_a_disk_that_fails(writer, code, existing, tmp_path, monkeypatch, capsys):
    target = tmp_path / "target"
    if existing:
        writer(target)
    before, names = contents(tmp_path), names_in(tmp_path)

    def save_file(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: text (os error {code})")

    monkeypatch.setattr(staging, "save_file", save_file)
    capsys.readouterr()
    with pytest.raises((OSError, SystemExit)) as caught:
        writer(target)
    if writer.name == "quantize":
        text = capsys.readouterr().err
        assert caught.value.code == 1
        assert text.startswith("torchao-mx: ") and "Traceback" not in text
        text = text.splitlines()[-1]
    else:
        assert caught.value.errno == code and caught.value.filename == str(target)
        text = str(caught.value)
    assert re.search(
        rf"{os.strerror(code)}: (adapter_)?model\S*\.safetensors \([\d,]+ bytes; [\d,]+ are free\)",
        text,
    )
    assert ("make room" in text) == (code in (errno.ENOSPC, errno.EDQUOT)) and str(target) in text
    assert contents(tmp_path) == before and names_in(tmp_path) == names


def test_files_beyond_the_limit_of_their_size(writer, tmp_path):
    """A write that the system itself refuses, late in the file."""
    target = tmp_path / "target"
    writer(target)
    before = contents(target)

    def save():
        size = max(f.stat().st_size for f in target.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, size - 100))
        writer(target)

    error, _ = in_child(save)
    if writer.name == "quantize":
        assert isinstance(error, SystemExit) and error.code == 1
    else:
        assert isinstance(error, OSError) and error.errno == errno.EFBIG
        assert error.filename == str(target)
    assert contents(target) == before


# --- what earlier versions left -------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["saved", "failed"])
@pytest.mark.parametrize("name", [n for n in WRITERS if n != "save_adapter"])
def test_leftovers_of_earlier_versions(name, fails, sources, tmp_path, monkeypatch):
    """Beside the folder: the old checkpoint, once the only one, an unfinished one; and what is not theirs."""
    target, old = tmp_path / "target", tmp_path / ".target.old"
    WRITERS[name](sources, old)
    before = contents(old)
    WRITERS[name](sources, tmp_path / ".target.0123abcd")
    (tmp_path / ".other.old").mkdir()
    (tmp_path / ".target.89abcdef").mkdir()
    (tmp_path / ".target.89abcdef" / "notes").write_text("")
    if fails:
        monkeypatch.setattr(publish, "_publish", never)
        with pytest.raises((AssertionError, SystemExit)):  # SystemExit of the command line
            WRITERS[name](sources, target)
        assert contents(target) == before and not old.exists()  # which can be loaded again
        return
    WRITERS[name](sources, target)
    assert {f.name for f in tmp_path.iterdir()} == {"target", ".other.old", ".target.89abcdef"}
    shutil.copytree(target, old)
    WRITERS[name](sources, target)
    assert not old.exists()
    from_pretrained(target)


def test_leftovers_in_the_folder(writer, tmp_path):
    for name in (".torchao_mx-0123abcd", ".adapter-x1_y2z3w"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text("half")
    (tmp_path / "model-saving-0123abcd-00001-of-00002.safetensors").write_text("half")
    (tmp_path / "model-saving-of-mine.safetensors.txt").write_text("kept")
    writer(tmp_path)
    assert set(names_in(tmp_path)) - {f.name for f in tmp_path.glob("*model*")} <= {
        "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json",
        "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    assert not list(tmp_path.glob("model-saving-0*"))
    assert (tmp_path / "model-saving-of-mine.safetensors.txt").read_text() == "kept"


# --- an adapter's two files -----------------------------------------------------------------------


@pytest.mark.parametrize("field", [{"r": 8}, {"lora_alpha": 16}, {"use_rslora": True}], ids=str)
def test_an_adapters_files_of_two_saves_are_refused(field, tmp_path):
    """As a copy that was interrupted leaves them."""
    model = adapted(8, 0)
    save_adapter(model, tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    file = tmp_path / "adapter_config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"base_model_name_or_path": "renamed", "task_type": "X"}))
    load_adapter(model, tmp_path)  # what the tensors do not depend on may be edited
    file.write_text(json.dumps(record | field))
    (name,) = field
    with pytest.raises(
        ValueError,
        match=rf"are from different saves: {name}={field[name]} and {record[name]}; copy both",
    ):
        load_adapter(model, tmp_path)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("both", [{}, {"before": None, "after": 3}, {"after": {}}], ids=str)
def test_a_damaged_record_of_an_interrupted_save(both, tmp_path):
    model = adapted(8, 0)
    save_adapter(model, tmp_path)
    record = json.dumps({"peft_type": "INTERRUPTED_SAVE"} | both)
    (tmp_path / "adapter_config.json").write_text(record)
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: .*interrupted save.*; save the adapter"
    ):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
