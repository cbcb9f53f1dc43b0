"""torchao-mx with good and bad folders and arguments: it exits with 0, 1 or 2, prints no traceback, says which file
or argument and what to do, and leaves every folder as it was unless it succeeds."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("transformers")
import _fuzz
import huggingface_hub.constants
import test_fuzz_adapters as adapters
import test_fuzz_checkpoints as checkpoints
from _fuzz_cases import several
from _fuzz_files import OUTSIDE, mutated, write
from _fuzz_oracle import (
    ScaleCalculationMode,
    Unreadable,
    decoded,
    equal,
    read_json,
    read_tensors,
    to_mx,
)

from torchao_mx.hf import cli

COMMANDS = {
    "inspect": ("gpt_oss", ("inspect", "{source}")),
    "compare": ("gpt_oss", ("inspect", "{source}", "--compare", "{other}")),
    "quantize": ("gpt_oss_bf16", ("quantize", "{source}", "{target}")),
    "merge": ("gpt_oss", ("merge", "{source}", "{adapter}", "{target}")),
}
PLACES = [
    "{source}", "{target}", "{adapter}", "{other}", "{missing}", "{file}", "{fifo}", "{source}/sub", "{missing}/sub",
    "{file}/sub", "{locked}", "{locked}/sub", "{loop}", "{link}", "", ".", "/proc/nosuch", "/dev/null", "x" * 300,
    "gpt/oss",
]  # fmt: skip
MODES = [f"mxfp4:{mode.value}" for mode in ScaleCalculationMode]
OPTIONS = [
    ("--json",), ("--force",), ("--nosuch",), ("--help",), ("--",), ("extra",), ("--config",),
    *(("--config", mode) for mode in [*MODES, "mxfp4", "mxfp8", "", "mxfp4:", "mxfp4:nosuch", "\udcff"]),
    *(("--max-shard-size", size) for size in ["5GB", "100KB", "1", "0", "-1", "1e3", "nan", "", "5 GB", "9" * 400, "9" * 5000, "1TBB", "0.0001", "½"]),
    *(("--compare", place) for place in PLACES),
]  # fmt: skip


def snapshot(folder):
    """Every name below a folder, with what is there."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        what = (
            path.read_bytes()
            if path.is_file() and not path.is_symlink()
            else path.is_symlink() or path.is_dir()
        )
        found[str(path.relative_to(folder))] = what
    return found


def prepare(folder, command, shards, target, mutations, others):
    """The folders that a command's arguments may name, as ``{place: path}``; whether file modes matter."""
    family, _ = COMMANDS[command]
    source = mutated(checkpoints.base(family, shards), mutations)
    other = mutated(checkpoints.base("gpt_oss_bf16", 1), others if command == "compare" else ())
    adapter = mutated(adapters.adapter("gpt_oss", 5), others if command == "merge" else ())
    (folder / OUTSIDE).write_bytes(b"")
    locked = [
        write(source, folder / "source"),
        write(other, folder / "other"),
        write(adapter, folder / "adapter"),
    ]
    places = {
        name: folder / name
        for name in (
            "source",
            "other",
            "adapter",
            "target",
            "missing",
            "file",
            "locked",
            "link",
            "loop",
            "fifo",
        )
    }
    places["file"] = folder / "plain.txt"  # a name that no message has by chance
    places["file"].write_text("text")
    places["locked"].mkdir()
    places["locked"].chmod(0o555)
    places["link"].symlink_to("target")
    places["loop"].symlink_to("loop")
    os.mkfifo(places["fifo"])
    if target == "old":
        write({**checkpoints.base(family, 3), "notes.txt": b"mine"}, places["target"])
    elif target == "empty":
        places["target"].mkdir()
    elif target == "readonly":
        places["target"].mkdir()
        places["target"].chmod(0o555)
    return places, any(locked)


def call(arguments):
    """(exit code, standard output, standard error, exception) of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code, error = cli.main(arguments), None
        except SystemExit as stopped:
            code, error = stopped.code, None
        except Exception as raised:
            code, error = None, raised
    return code, out.getvalue(), err.getvalue(), error


def run(folder, command, shards, target, arguments, others, mutations):
    """``mutations`` of the source, ``others`` of the adapter or of what it is compared with."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    places, _ = prepare(folder, command, shards, target, mutations, others)
    arguments = [_filled(a, places) for a in arguments]
    before = snapshot(folder)
    here = Path.cwd()
    os.chdir(folder / "other")  # "." names a folder of the case
    try:
        with _fuzz.listening(), _fuzz.unprivileged(folder, True):
            code, out, err, error = call(arguments)
    finally:
        os.chdir(here)
    return judge(folder, places, arguments, before, code, out, err, error)


def _filled(argument, places):
    for name, path in places.items():
        argument = argument.replace(f"{{{name}}}", str(path))
    return argument


def judge(folder, places, arguments, before, code, out, err, error):
    if error is not None:
        verdict = _fuzz.judge_refusal(error, ())
        return _fuzz.Verdict(f"traceback: {type(error).__name__}", verdict.text)
    after = snapshot(folder)
    if "Traceback (most recent" in err:
        return _fuzz.Verdict("a traceback printed", err)
    if "report it, please" in err:
        return _fuzz.Verdict("an error that nobody expected", err)
    if code not in (0, 1, 2):
        return _fuzz.Verdict(f"exit code {code!r}", err)
    if code:
        harmed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        if harmed:
            return _fuzz.Verdict("failed, and changed files", f"{err[:500]}\n{harmed}")
        files = {
            p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()
        }
        names = (
            adapters.names_in(files)
            | {a for a in arguments[1:] if len(a) > 1 and a != "--json"}
            | {f": {a or '.'}: " for a in arguments[1:]}
            | {"argument", "the following arguments"}
        )
        verdict = _fuzz.judge_message(err, names, f"exit {code}")
        usage = code == 2 and "usage: " in err  # which says how
        return _fuzz.Verdict(_fuzz.REFUSED if usage else verdict.kind, verdict.text)
    if "--help" in arguments:
        return _fuzz.Verdict(_fuzz.LOADED)
    return _done(folder, places, arguments, before, after, out)


def positional(arguments, folder):
    """The folders that a command was given, "." being ``folder / "other"``."""
    valued = ("--config", "--max-shard-size", "--compare")
    words = zip(["", *arguments], arguments, strict=False)
    kept = [word for before, word in words if before not in valued and not word.startswith("--")]
    return [folder / "other" / word for word in kept[1:]]


def _done(folder, places, arguments, before, after, out):
    """What a command that succeeded did: read by the oracle, with nothing but its target changed."""
    paths = positional(arguments, folder)
    target = paths[-1].resolve() if arguments[0] != "inspect" else folder / "nothing"
    inside = target.relative_to(folder.resolve())
    strangers = [
        k for k in before.keys() | after.keys()
        if before.get(k) != after.get(k) and not Path(k).is_relative_to(inside) and k not in map(str, inside.parents)
    ]  # fmt: skip
    if strangers:
        return _fuzz.Verdict("changed more than its target", str(strangers))
    try:
        if arguments[0] == "inspect":
            problem = _inspected(read_tensors(paths[0]), arguments, out)
        elif read_json(target / "config.json")["quantization_config"]["quant_method"] != "mxfp4":
            problem = "config.json says no mxfp4"
        elif arguments[0] == "quantize":
            problem = _quantized(read_tensors(paths[0]), arguments, read_tensors(target))
        else:
            problem = _merged(read_tensors(paths[0]), paths[1], read_tensors(target))
    except Unreadable as error:
        return _fuzz.Verdict("succeeded with what is unreadable", str(error))
    return _fuzz.Verdict("wrong output", problem) if problem else _fuzz.Verdict(_fuzz.LOADED)


def _inspected(tensors, arguments, out):
    """What is wrong with ``out``, the table or the JSON of the packed ``tensors``."""
    names = sorted(n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks"))
    if "--json" not in arguments:
        wrong = [n for n in names if n not in out]
    else:
        found = json.loads(out)
        rows = {row["name"]: row for row in found["weights"]}
        scales = {n: tensors[f"{n}_scales"].view(torch.uint8).int() for n in names}
        wrong = [
            n for n in names if n not in rows or rows[n]["nan_scales"] != (scales[n] == 255).sum()
        ]
        wrong += [n for n in rows if n not in names]
    return str(wrong) if wrong else ""


def _quantized(source, arguments, tensors):
    """What is wrong with ``tensors``, quantized from those of ``source``."""
    given = [a.partition(":")[2] for a in arguments if a.startswith("mxfp4")]
    mode = ScaleCalculationMode(given[-1] if given and given[-1] else "rceil")
    for name, value in source.items():
        if f"{name}_blocks" not in tensors:
            if name in tensors and not equal(tensors[name], value):
                return f"{name} differs"
            continue
        scale, data = to_mx(value.mT.contiguous(), torch.float4_e2m1fn_x2, 32, scaling_mode=mode)
        same = torch.equal(data.view(torch.uint8), tensors[f"{name}_blocks"].flatten(-2))
        if not same or not torch.equal(scale.view(torch.uint8), tensors[f"{name}_scales"]):
            return f"{name} was packed from other values"
    return ""


def _merged(old, adapter, tensors):
    """What is wrong with ``tensors``, each within what rounding to 4 bits takes of ``W + s B A``."""
    said = adapters.SaidAdapter(adapter)
    updates = said.updates(adapters.sizes("gpt_oss"))

    def values(of):
        packed = {n.removesuffix("_blocks") for n in of if n.endswith("_blocks")}
        plain = {
            n: t.bfloat16().float() for n, t in of.items() if not n.endswith(("_blocks", "_scales"))
        }
        return plain | {n: decoded(of[f"{n}_blocks"], of[f"{n}_scales"]) for n in packed}

    before, after = values(old), values(tensors)
    for name, value in after.items():
        wanted = before[name].double()
        if name in updates:
            a, b = (t.double() for t in updates[name])
            wanted = wanted + said.scaling * (b @ a)
            if not (value.double() - wanted).norm() < 0.25 * wanted.norm():
                return f"{name} was merged to something else"
        elif not equal(value, before[name]):
            return f"{name} changed"
    return ""


# --- cases --------------------------------------------------------------------------------------------


def _changed(arguments):
    """The arguments of a command, one of them another or left out, or with options that are none."""
    words = st.sampled_from([*PLACES, "quantize", "inspect", "merge", "nosuch", "-", "-1"])
    at = st.sampled_from([0, *list(range(1, len(arguments))) * 4])
    replaced = st.tuples(at, words).map(
        lambda d: (*arguments[: d[0]], d[1], *arguments[d[0] + 1 :])
    )
    dropped = at.map(lambda i: (*arguments[:i], *arguments[i + 1 :]))
    options = st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=2)
    more = options.map(lambda found: (*arguments, *(word for option in found for word in option)))
    return st.one_of(replaced, replaced, dropped, more)


def _sound(arguments):
    """The arguments of a command, with an option that it has or with none."""
    options = [(), (), ("--json",)]
    if arguments[0] != "inspect":
        sizes, modes = ("1", "100KB"), ("mxfp4", *MODES)
        options += [("--max-shard-size", s) for s in sizes] + [("--config", m) for m in modes]
    return st.sampled_from(options).map(lambda found: (*arguments, *found))


def cases():
    def of(command):
        family, arguments = COMMANDS[command]

        def on(shards):
            sources = several(checkpoints.mutations(checkpoints.base(family, shards)))
            if command == "merge":
                others = several(adapters.mutations(adapters.adapter("gpt_oss", 5)))
            elif command == "compare":
                others = several(checkpoints.mutations(checkpoints.base("gpt_oss_bf16", 1)))
            else:
                others = st.just(())
            good = st.just(((), ()))
            bad = st.one_of(sources.map(lambda m: (m, ())), others.map(lambda m: ((), m)))
            damaged = st.tuples(_sound(arguments), bad)
            junk = st.tuples(_changed(arguments), good)
            both = st.tuples(_changed(arguments), bad)
            targets = st.sampled_from(["new", "new", "old", "old", "empty", "readonly"])
            return st.tuples(targets, st.one_of(damaged, damaged, damaged, junk, both)).map(
                lambda d: (command, shards, d[0], d[1][0], d[1][1][1], d[1][1][0])
            )

        return st.sampled_from([1, 3]).flatmap(on)

    return st.sampled_from(sorted(COMMANDS)).flatmap(of)


def test_cli(request):
    _fuzz.fuzz(request, run, cases(), examples=25)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_undamaged(command, shards):
    arguments = (*COMMANDS[command][1], "--json")
    assert _fuzz.once(run, command, shards, "old", arguments, (), ()) == _fuzz.Verdict(_fuzz.LOADED)


def test_as_a_process(tmp_path):
    """The command itself exits and speaks as the function does."""
    places, _ = prepare(
        tmp_path, "quantize", 3, "old", (("cut", "model-00002-of-00003.safetensors", 999),), ()
    )
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "torchao_mx.hf.cli", "quantize", places["source"], places["target"]],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (
        judge(
            tmp_path, places, ["quantize"], before, done.returncode, done.stdout, done.stderr, None
        ).kind
        == _fuzz.REFUSED
    )
