"""The command line of the demo."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from torchao_mx.demo.run import Run
from torchao_mx.demo.settings import LORA, QUICK, DemoError, Settings, flag

_DESCRIPTION = """\
Training for and on weights in microscaling formats, end to end, on the bytes of real text.

--method qat (the default) trains a small transformer, goes on from the same weights over new text in
high precision (arm 0), quantizes that (arm 1, PTQ), and sets beside it quantization-aware training over
the same batches, converted at its end (arm 2, QAT). The converted checkpoint is loaded in a fresh
process, and must have the same loss to the last bit.

--method lora pretrains a tiny gpt-oss on program text, saves it as gpt-oss is published, its experts in
MXFP4 (arm 0), and adapts it to prose: by LoRA on the packed experts (arm 1), and on the same dequantized,
by PEFT (arm 2). In a fresh process stock transformers and PEFT load what arm 1 saved, and must compute
the same loss, rounding errors aside. It needs the hf extra.

After Ctrl-C the same command goes on from the last evaluation."""

_EPILOG = "defaults of --method lora:\n  " + " ".join(f"{flag(k)} {v}" for k, v in LORA.items())


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code.

    Raises:
        SystemExit: of argparse, for wrong usage (2) and ``--help`` (0).
    """
    settings, out = _parse(argv)
    start = time.perf_counter()
    try:
        run = Run(settings, out.resolve())
        count = sum(p.numel() for p in run.method.build(settings).parameters())
        print(f"data     {run.corpus.describe()}")
        print(f"model    {count / 1e6:.2f} M parameters in fp32, on {settings.device}")
        print(f"folder   {run.out}\n", flush=True)
        run.execute()
    except (DemoError, OSError) as error:
        print(f"torchao_mx.demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from there", file=sys.stderr)
        return 130
    print(f"curves.png, results.json and {run.method.MADE} are in {run.out}")
    print(f"{time.perf_counter() - start:.0f} s in all\n")
    print(f"Next, with a real model:\n\n{textwrap.indent(run.method.NEXT_PYTHON, '    ')}")
    print(f"and serve it, which we have not run:\n\n    {run.method.NEXT_SHELL}")
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(
        prog="torchao_mx.demo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, help="folder; demo_runs/FORMAT-seedSEED if not given")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds, no findings")
    for option in fields(Settings):
        parser.add_argument(flag(option.name), default=option.default, **option.metadata)
    chosen = parser.parse_args(argv)
    defaults = (LORA if chosen.method == "lora" else {}) | (QUICK if chosen.quick else {})
    parser.set_defaults(**defaults)
    args = vars(parser.parse_args(argv))
    out, _ = args.pop("out"), args.pop("quick")
    settings = Settings(**args)
    name = settings.format if settings.method == "qat" else settings.method
    out = out or Path("demo_runs", f"{name}-seed{settings.seed}")
    if problem := settings.problem():
        parser.error(problem)
    if settings.data and out.resolve().is_relative_to(settings.data):
        parser.error(f"--out {out}: lies in --data, so that the run's own files would be its text")
    return settings, out
