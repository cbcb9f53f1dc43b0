"""torchao-mx: inspect, quantize and merge checkpoints from the command line.

    torchao-mx inspect FOLDER [--compare FOLDER] [--json]
    torchao-mx quantize IN OUT [--config mxfp4[:MODE]] [--max-shard-size 5GB] [--json]
    torchao-mx merge BASE ADAPTER OUT [--force] [--config mxfp4[:MODE]] [--max-shard-size 5GB] [--json]

``inspect`` lists the packed weights of a checkpoint in gpt-oss's layout (``NAME_blocks``, ``NAME_scales``):
shape, bytes, the range of the scales as powers of two, and the number of rows that are e4m3 numbers times one
power of two and so lossless on 8-bit tensor cores. ``--compare`` adds the error of the packed values relative
to the high-precision weights ``NAME`` of another checkpoint.

``quantize`` packs the experts of a high-precision gpt-oss checkpoint one tensor at a time, and lists the
error of each.

``merge`` adds an adapter that ``save_adapter`` or PEFT saved to the weights of a packed checkpoint, and lists
the rounding error. If a weight keeps less than a tenth of its update, as is usual in 4 bits, nothing is
written without ``--force``.

MODE says how a block's scale follows from its largest magnitude; for ``merge``, see ``merge_adapter``. OUT is
written completely or left unchanged; files other than weights, such as a tokenizer's, are copied into it.

Exit codes: 0 on success; 1 if a checkpoint or adapter is damaged or does not fit, a merge loses an update, or
the system fails; 2 for invalid arguments; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from torchao_mx.errors import HIGH_PRECISION_DTYPES
from torchao_mx.formats import MXFP4, ScaleCalculationMode
from torchao_mx.hf.adapter import check_config, read_adapter
from torchao_mx.hf.checkpoint import read_folder
from torchao_mx.hf.config import checked_method, load_config
from torchao_mx.hf.inspection import Row, inspect
from torchao_mx.hf.load import from_pretrained
from torchao_mx.hf.merge import SCALING_MODE, MergeWarning, lost_updates, merge_adapter
from torchao_mx.hf.publish import check_target
from torchao_mx.hf.quantize import quantize_checkpoint
from torchao_mx.hf.save import save_model
from torchao_mx.hf.write import bytes_of

_Columns = dict[str, Callable[[Row], str]]
# Rows, totals, how the table shows a row, and its last line.
_Result = tuple[list[Row], Row, _Columns, str]

_NAME: _Columns = {"weight": lambda row: row["name"]}
_SHAPE: _Columns = {"shape": lambda row: " x ".join(map(str, row["shape"]))}
_ERROR: _Columns = {"relative error": lambda row: f"{row['error']:.4f}"}


def _inspect(options: argparse.Namespace) -> _Result:
    rows, total = inspect(options.folder, options.compare)
    columns: _Columns = {
        **_NAME,
        "format": lambda row: row["format"],
        **_SHAPE,
        "bytes": lambda row: f"{row['bytes']:,}",
        "scales": _scales,
        "rows lossless in e4m3": lambda row: f"{row['lossless_rows']:,} of {row['rows']:,}",
        **(_ERROR if options.compare else {}),
    }
    bits = 8 * total["packed_bytes"] / total["elements"]
    summary = (
        f"{total['packed_weights']} packed weights, {total['packed_bytes']:,} bytes, {bits:.2f} bits per "
        f"element; {total['other_tensors']} other tensors"
    )
    return rows, total, columns, summary


def _scales(row: Row) -> str:
    nan = f", {row['nan_scales']:,} NaN" if row["nan_scales"] else ""
    return f"2^{row['min_exponent']} .. 2^{row['max_exponent']}{nan}"


def _quantize(options: argparse.Namespace) -> _Result:
    rows, total = quantize_checkpoint(
        options.source,
        options.target,
        options.config or ScaleCalculationMode.RCEIL,
        options.max_shard_size,
    )
    columns: _Columns = {
        **_NAME,
        **_SHAPE,
        "bytes before": lambda row: f"{row['bytes_before']:,}",
        "bytes after": lambda row: f"{row['bytes_after']:,}",
        **_ERROR,
    }
    summary = (
        f"{total['quantized_weights']} weights quantized, {total['bytes_before']:,} bytes to "
        f"{total['bytes_after']:,}; {total['other_tensors']} other tensors unchanged"
    )
    return rows, total, columns, summary


def _merge(options: argparse.Namespace) -> _Result:
    entries = read_folder(options.source)
    config, _ = load_config(options.source, entries.values())
    if checked_method(config, entries, options.source) is None:
        raise ValueError(
            f"{options.source}: in high precision; merge with PEFT's merge_and_unload() instead, and pack "
            f"the result with torchao-mx quantize"
        )
    check_config(read_adapter(options.adapter)[0])  # before the slow part
    dtype = config.dtype if config.dtype in HIGH_PRECISION_DTYPES else torch.bfloat16
    model = from_pretrained(options.source, dtype=dtype)
    mode = options.config or SCALING_MODE
    with warnings.catch_warnings():
        if not options.force:  # raised as an error below
            warnings.simplefilter("ignore", MergeWarning)
        errors = merge_adapter(model, options.adapter, scaling_mode=mode)
    lost = lost_updates(errors)
    if lost is not None and not options.force:
        raise ValueError(f"{lost}\n{options.target} is not written; --force writes it anyway")
    save_model(model, options.target, options.max_shard_size, {}, others=options.source)
    rows = [{"name": name, **error._asdict()} for name, error in errors.items()]
    worst = {key: max(row[key] for row in rows) for key in ("weight_error", "delta_error")}
    worst["kept"] = min(row["kept"] for row in rows)
    columns: _Columns = {
        **_NAME,
        "error of the weight": lambda row: f"{row['weight_error']:.4f}",
        "of the update": lambda row: f"{row['delta_error']:.4f}",
        "update kept": lambda row: f"{row['kept']:.4f}",
    }
    summary = (
        f"{len(rows)} weights merged, with errors of up to {worst['weight_error']:.4f} of the weight and "
        f"{worst['delta_error']:.4f} of the update, where 1 is the cost of leaving it out; at least "
        f"{worst['kept']:.4f} of each update is kept"
    )
    return rows, {"merged_weights": len(rows), **worst}, columns, summary


def _table(columns: _Columns, rows: list[Row]) -> str:
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def _scaling_mode(text: str) -> ScaleCalculationMode | None:
    """The MODE of ``mxfp4:MODE``; None for plain ``mxfp4``."""
    modes = {f"{MXFP4.name}:{mode.value}": mode for mode in ScaleCalculationMode}
    modes[MXFP4.name] = None
    if text not in modes:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(sorted(modes))}")
    return modes[text]


def _size(text: str) -> int:
    try:
        return bytes_of(text)
    except (OverflowError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchao-mx", description="Checkpoints in microscaling formats."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="what a packed checkpoint holds")
    command.set_defaults(run=_inspect)
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="the same weights in high precision"
    )
    _add_options(command)

    command = commands.add_parser("quantize", help="pack a gpt-oss checkpoint in high precision")
    command.set_defaults(run=_quantize)
    command.add_argument("source", type=Path, metavar="IN")
    command.add_argument("target", type=Path, metavar="OUT")
    _add_options(command, writes=True)

    command = commands.add_parser("merge", help="add an adapter to a packed checkpoint's weights")
    command.set_defaults(run=_merge)
    command.add_argument("source", type=Path, metavar="BASE")
    command.add_argument("adapter", type=Path, metavar="ADAPTER")
    command.add_argument("target", type=Path, metavar="OUT")
    command.add_argument(
        "--force",
        action="store_true",
        help="write the result even if rounding undoes updates",
    )
    _add_options(command, writes=True)
    return parser


def _add_options(command: argparse.ArgumentParser, writes: bool = False) -> None:
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    if writes:
        modes = ", ".join(mode.value for mode in ScaleCalculationMode)
        command.add_argument(
            "--config", type=_scaling_mode, default=MXFP4.name,
            help=f"mxfp4[:MODE], MODE one of {modes}; default: rceil for quantize, even for merge",
        )  # fmt: skip
        command.add_argument(
            "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="per file"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _run(parser, options)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        return _failed(str(error))
    except Exception as error:  # torch out of memory, for example
        given = options.source if "source" in options else options.folder
        return _failed(
            f"{options.command} of {given} stopped with {type(error).__name__}: {error}; unless memory ran "
            f"out, please report it"
        )


def _failed(message: str, code: int = 1) -> int:
    text = f"torchao-mx: {message}".encode(errors="backslashreplace").decode()
    print(text, file=sys.stderr)  # escaped, since a name in it may not be UTF-8
    return code


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    writes = "target" in options
    if writes and os.path.realpath(options.target) == os.path.realpath(options.source):
        parser.error(f"OUT is {options.target}, the folder to read from; give another")
    if writes:
        check_target(options.target, merged=options.run is _merge)  # before the slow part
    rows, total, columns, summary = options.run(options)
    if options.json:
        print(json.dumps({"weights": rows, "total": total}))
    else:
        print(_table(columns, rows), summary, sep="\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
