"""The command line of the demo."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchao_mx.demo import lora, qat
from torchao_mx.demo.checkpoint import CheckpointError
from torchao_mx.demo.device import resolve
from torchao_mx.demo.quant import FORMATS
from torchao_mx.demo.run import (
    Run,
    VerificationError,
    check_corpus,
    clear,
    is_unfinished,
    load_checkpoint,
)
from torchao_mx.demo.settings import DTYPES, METHODS, QUICK, Settings, UsageError, flag, names_of
from torchao_mx.demo.train import Diverged, Interrupted, OnStep

_OK, _FAILED, _USAGE, _INTERRUPTED = 0, 1, 2, 130

_RUNS: dict[str, type[Run]] = {"qat": qat.QATRun, "lora": lora.LoRARun}
_NOT_TAKEN = {
    "qat": "its model has no experts, and all of it is trained",
    "lora": "gpt-oss's checkpoints hold experts in MXFP4",
}

_DESCRIPTION = """\
Training for and on weights in microscaling formats, end to end, on the bytes of real text.

--method qat (the default) sets quantization-aware training against post-training quantization. It
trains a small causal transformer, then goes on from the same weights, over new text, in three ways,
and compares their loss on text that none has seen:

  arm 0   fine-tune in high precision
  arm 1   the same, then quantize (PTQ)
  arm 2   fine-tune with fake quantization (QAT), then convert

Arms 0 and 2 see the same batches in the same order. The converted checkpoint of arm 2 is loaded in
a fresh process, and its held-out loss must be equal to the last bit.

--method lora trains adapters on frozen experts in MXFP4. It pretrains a tiny gpt-oss on program
text, saves it as gpt-oss is published, and adapts it to prose; it needs the hf extra:

  arm 0   the packed checkpoint as it is
  arm 1   LoRA on its experts, which stay packed
  arm 2   LoRA on the same experts dequantized, by PEFT

Arms 1 and 2 start from the same adapters and see the same batches. Checkpoint and adapter of arm 1
are loaded by stock transformers and PEFT in a fresh process, and their held-out loss must be equal
but for rounding in fp32.

The defaults of either take about three minutes on two CPU cores."""

_EPILOG = """\
examples:
  python -m torchao_mx.demo                                  MXFP4 weights and activations
  python -m torchao_mx.demo --format nvfp4 --seed 1          another format, another seed
  python -m torchao_mx.demo --method lora                    LoRA on experts in MXFP4
  python -m torchao_mx.demo --data ~/texts --dim 256 --layers 6 --steps 1000
  python -m torchao_mx.demo --resume demo_runs/mxfp4-seed0   go on after Ctrl-C
  python -m torchao_mx.demo --verify demo_runs/mxfp4-seed0/converted.pt

exit codes: 0 done; 1 failed (a damaged checkpoint, an unequal loss); 2 wrong usage;
130 interrupted"""


def main(argv: Sequence[str] | None = None, on_step: OnStep | None = None) -> int:
    """Run the demo and return its exit code; ``on_step`` is called after each training step."""
    parser = _parser()
    try:
        given = vars(parser.parse_args(argv))
    except SystemExit as leave:  # argparse has printed the help or the error
        return leave.code if isinstance(leave.code, int) else _OK
    try:
        if "verify" in given:
            return _verify(given)
        run = _resumed(given, on_step) if "resume" in given else _new(given, on_step)
        return _execute(run)
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return _USAGE
    except (CheckpointError, Diverged, VerificationError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _new(given: dict[str, Any], on_step: OnStep | None) -> Run:
    """A run of the settings in ``given``, in an emptied folder."""
    name = given.get("method", Settings.method)
    method, run_class = METHODS[name], _RUNS[name]
    others = set().union(*map(names_of, METHODS.values())) - names_of(method)
    _refuse([n for n in given if n in others], f"--method {name}", _NOT_TAKEN[name])
    chosen = {name: value for name, value in given.items() if name in names_of(method)}
    settings = method(**{**(QUICK if "quick" in given else {}), **chosen})
    settings.validate()
    run_class.check_installed()
    settings, note = resolve(settings, run_class.build)
    out = given.get("out", Path("demo_runs", f"{settings.name}-seed{settings.seed}")).resolve()
    if is_unfinished(out) and "overwrite" not in given:
        raise UsageError(
            f"--out {out}: holds an unfinished run; go on with --resume {out}, start again with "
            f"--overwrite, or choose another folder"
        )
    if settings.data is not None and out.is_relative_to(settings.data):
        raise UsageError(
            f"--out {out}: lies in --data {settings.data}, so the run's own files would be read as "
            f"its text; choose another folder"
        )
    run = run_class(settings, out, on_step)
    try:
        clear(out, run.files)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error.strerror})") from error
    print(f"device   {note}")
    return run


def _resumed(given: dict[str, Any], on_step: OnStep | None) -> Run:
    """The run in the folder that ``--resume`` names."""
    _refuse_beside(given, "resume", "a run goes on with the settings it was started with")
    out = given["resume"].resolve()
    if not out.is_dir():
        raise UsageError(f"--resume {given['resume']}: no such folder")
    settings, record = load_checkpoint(out)
    run_class = _RUNS[settings.method]
    run_class.check_installed()
    run = run_class(settings, out, on_step)
    check_corpus(record, run.corpus, out)
    run.restore(record)
    print(f"device   {settings.device}, {settings.dtype} weights and compute, as the run began")
    return run


def _verify(given: dict[str, Any]) -> int:
    _refuse_beside(given, "verify", "the checkpoint knows its settings")
    path = given["verify"]
    print(lora.verify(path) if path.is_dir() else qat.verify(path))
    return _OK


def _execute(run: Run) -> int:
    start = time.perf_counter()
    print(f"data     {run.corpus.describe()}")
    for word, text in run.describe().items():
        print(f"{word:8} {text}")
    print(f"folder   {run.out}\n", flush=True)
    try:
        results = run.execute()
    except (Interrupted, KeyboardInterrupt) as stop:
        where = f" in {stop}" if str(stop) else ""
        command = shlex.join(["python", "-m", "torchao_mx.demo", "--resume", str(run.out)])
        print(f"\nInterrupted{where}. To go on:\n  {command}", file=sys.stderr)
        return _INTERRUPTED
    print(f"\n{run.format_table(results)}\n")
    *others, last = run.made
    print(
        f"{' and '.join(run.made)}, loaded in a fresh process: {results['verification']['message']}"
    )
    print(f"{', '.join(['curves.png', 'results.json', *others])} and {last} are in {run.out}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return _OK


def _refuse_beside(given: dict[str, Any], name: str, why: str) -> None:
    _refuse([other for other in given if other != name], flag(name), why)


def _refuse(names: list[str], what: str, why: str) -> None:
    """A usage error for the options ``names``, unless there are none."""
    if names:
        raise UsageError(f"{what} takes no {', '.join(map(flag, names))}: {why}")


def _parser() -> argparse.ArgumentParser:
    """Only the options that were given end up in the namespace."""
    parser = argparse.ArgumentParser(
        prog="torchao_mx.demo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        metavar="NAME",
        help=f"{' or '.join(METHODS)}, as above (default {Settings.method})",
    )
    parser.add_argument(
        "--format",
        metavar="NAME",
        help=f"qat: what arms 1, 2 end in: {', '.join(FORMATS)} (default {Settings.format})",
    )
    parser.add_argument(
        "--data",
        type=_path,
        metavar="PATH",
        help="a text file, or a folder of text; default: the source of Python's standard library. "
        "lora adapts to it; default: the prose of Python's language reference",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where checkpoints, table and picture go (default demo_runs/FORMAT-seedSEED, or lora-seedSEED)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start again where --out holds an unfinished run"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of seconds: tiny sizes, no findings"
    )
    _add(parser, "seed", int, "for the first weights and the order of the data")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto: a GPU if any)")
    parser.add_argument(
        "--dtype",
        help=f"auto, {' or '.join(DTYPES)}: of weights and compute (default auto: bf16 on a GPU, "
        f"and on a CPU if a measurement at the start finds it faster)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads; default: as many as the tensors' size is worth, 1 for the default sizes",
    )

    model = parser.add_argument_group("model")
    _add(model, "layers", int, "transformer blocks")
    _add(model, "dim", int, "width; a multiple of 32")
    _add(model, "heads", int, "attention heads")
    _add(model, "seq", int, "bytes a window")
    _add(model, "experts", int, "experts a layer")
    _add(model, "top_k", int, "experts that a token goes to")
    _add(model, "rank", int, "of the adapters")

    training = parser.add_argument_group("training")
    _add(training, "pretrain_steps", int, "steps that all arms share")
    _add(training, "steps", int, "fine-tuning steps of each arm")
    _add(training, "batch", int, "windows a step")
    _add(training, "pretrain_lr", float, "peak learning rate of pretraining")
    _add(training, "lr", float, "peak learning rate of fine-tuning, which decays to 0")
    _add(training, "eval_windows", int, "held-out windows, or as many as there are")
    _add(training, "eval_every", int, "steps between evaluations and checkpoints")

    other = parser.add_argument_group("instead of a new run")
    other.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    other.add_argument(
        "--verify",
        type=Path,
        metavar="PATH",
        help="load a converted.pt and check that its held-out loss is the recorded one, exactly; or, "
        "given a folder, the model and adapter of a lora run, but for rounding",
    )
    return parser


def _add(group: argparse._ActionsContainer, name: str, kind: type, text: str) -> None:
    defaults = {m: getattr(cls, name) for m, cls in METHODS.items() if name in names_of(cls)}
    if len(set(defaults.values())) > 1:
        shown = ", ".join(f"{method} {value:g}" for method, value in defaults.items())
    else:
        [value] = set(defaults.values())
        text = text if len(defaults) == len(METHODS) else f"{next(iter(defaults))}: {text}"
        shown = f"{value:g}"
    group.add_argument(
        flag(name),
        type=kind,
        metavar={int: "N", float: "X"}[kind],
        help=f"{text} (default {shown})",
    )


def _path(text: str) -> str:
    return str(Path(text).expanduser().resolve())
