"""Check that a high-precision checkpoint has every tensor that a model needs, and no tensor without a place.

transformers fills missing tensors at random, and only transformers knows which tensors feed a parameter: it
renames and ties them, and merges those of single experts. So its own loader first runs on ``meta`` tensors
with the headers' shapes, and reports missing, left-over and misshapen tensors before any data are read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from torchao_mx.hf.checkpoint import FLOATS, tied_problems
from torchao_mx.hf.config import from_transformers, has_owner
from torchao_mx.hf.files import Entry
from torchao_mx.hf.problems import FIT, misshapen, missing, mistyped, raise_problems, unplaced
from torchao_mx.hf.versions import is_v5

_NUMBERED = re.compile(r"(.+\.experts)\.(\d{1,9})\.(.+)")
Report = dict[str, Any]  # transformers' output_loading_info


def check_complete(
    entries: dict[str, Entry],
    skeleton: PreTrainedModel,
    folder: Path,
    *,
    new_head: bool = False,
    ignore_mismatched: bool = False,
) -> None:
    """Refuse a checkpoint that cannot fill all of ``skeleton``, a model on ``meta``.

    Args:
        entries: the checkpoint's tensors.
        skeleton: has the class and dtype to be loaded.
        folder: the checkpoint's folder, for messages.
        new_head: tensors outside the base model may be missing, such as a classifier's head.
        ignore_mismatched: the user allows other shapes.

    Raises:
        ValueError: one line per tensor that is missing, left over, misshapen or of an integer dtype.
    """
    problems = _dtype_problems(entries, skeleton) | _expert_problems(entries, skeleton)
    problems |= tied_problems(entries, skeleton)
    if not is_v5() and not ignore_mismatched:
        problems |= _shape_problems(entries, skeleton)
    # Even here v4 fills missing and misshapen tensors in CPU memory; absurd sizes would exhaust it.
    report = None if problems and not is_v5() else _dry_run(entries, skeleton)
    if report is not None:
        problems |= report_problems(report, entries, skeleton, new_head, ignore_mismatched)
    raise_problems(problems.values(), f"{folder} cannot be loaded")


def report_problems(
    report: Report,
    entries: dict[str, Entry],
    model: PreTrainedModel,
    new_head: bool = False,
    ignore_mismatched: bool = False,
) -> dict[str, str]:
    """Turn transformers' loading report into problems: one line per tensor, by name."""
    problems = {}
    inside = f"{model.base_model_prefix}."
    unexpected = sorted(report["unexpected_keys"])
    for name in sorted(report["missing_keys"]):
        if not new_head or name.startswith(inside):
            near = difflib.get_close_matches(name, unexpected, 1) if len(problems) < 12 else []
            kin = f", but {near[0]} is there, which the model does not have" if near else ""
            problems[name] = missing(name, kin)
    for name in unexpected:
        if has_owner(model, name):
            problems[name] = unplaced(name)
    if not ignore_mismatched:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for mismatch in report["mismatched_keys"]:  # with two shapes in v5
            name = mismatch if isinstance(mismatch, str) else mismatch[0]
            found = entries[name].shape if name in entries else "another"
            found = found if isinstance(mismatch, str) else tuple(mismatch[1])
            problems[name] = misshapen(name, found, shapes[name])
    return problems


def _dtype_problems(entries: dict[str, Entry], skeleton: PreTrainedModel) -> dict[str, str]:
    """Integer or packed tensors under the name of a high-precision tensor."""
    state = skeleton.state_dict()
    prefix = f"{skeleton.base_model_prefix}."
    problems = {}
    for name, entry in entries.items():
        wanted = next(
            (state[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in state), None
        )
        if prefix + name in entries:
            problems[name] = (
                f"{name}: present twice, also as {prefix + name}; export the checkpoint again"
            )
        elif wanted is not None and wanted.is_floating_point() and entry.dtype not in FLOATS:
            problems[name] = mistyped(name, entry.dtype, FLOATS)
    return problems


def _shape_problems(entries: dict[str, Entry], skeleton: PreTrainedModel) -> dict[str, str]:
    """Misshapen tensors under v4, whose loader neither transposes nor merges."""
    return {
        name: misshapen(name, entries[name].shape, tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if name in entries and entries[name].shape != tensor.shape
    }


def _expert_problems(entries: dict[str, Entry], skeleton: PreTrainedModel) -> dict[str, str]:
    """Problems with tensors of single experts, which transformers stacks in order, whatever their numbers."""
    wanted = skeleton.state_dict()
    groups: dict[str, dict[str, dict[int, str]]] = {}
    for name in entries:
        if match := _NUMBERED.fullmatch(name):
            kinds = groups.setdefault(match[1], {})
            kinds.setdefault(match[3], {})[int(match[2])] = name
    problems = {}
    for stem, kinds in groups.items():
        for kind, names in kinds.items():
            # In some models, experts lack some of these tensors.
            stacked = wanted.get(f"{stem}.{kind.removesuffix('.weight')}")
            experts = max(map(len, kinds.values())) if stacked is None else len(stacked)
            shape = entries[next(iter(names.values()))].shape
            for number in set(range(experts)) - names.keys():
                name = f"{stem}.{number}.{kind}"
                problems[name] = missing(name)
            for number, name in names.items():
                if number >= experts:
                    problems[name] = f"{name}: there are only {experts} experts, from 0 on; {FIT}"
                elif entries[name].shape != shape:
                    problems[name] = (
                        f"{name}: has shape {entries[name].shape}, the others {shape}; {FIT}"
                    )
                elif entries[name].dtype not in FLOATS:
                    problems[name] = mistyped(name, entries[name].dtype, FLOATS)
    return problems


def _dry_run(entries: dict[str, Entry], skeleton: PreTrainedModel) -> Report | None:
    """transformers' report on the files' headers; None if its loader cannot run on ``meta``.

    The dry run needs Accelerate, and fails at operations without a ``meta`` kernel. The report of the actual
    load then decides.
    """
    state = {name: entry.empty() for name, entry in entries.items()}
    try:
        with _quiet():
            _, report = type(skeleton).from_pretrained(
                None, config=skeleton.config, state_dict=state, dtype=skeleton.dtype,
                device_map={"": "meta"}, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception:
        return None
    return report


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' log and progress bar."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_whole(
    auto_class: Any,
    folder: Path,
    entries: dict[str, Entry],
    *,
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """``auto_class.from_pretrained(folder, **options)``, refusing a model with randomly filled tensors.

    Raises:
        ValueError: as :func:`check_complete`, from the report of the load itself; files that transformers
            cannot read.
    """
    remedy = "use a config.json and weights that belong together"
    with from_transformers(folder, remedy, ValueError, TypeError, NotImplementedError):
        model, report = auto_class.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, **options
        )
    ignore_mismatched = bool(options.get("ignore_mismatched_sizes"))
    problems = report_problems(report, entries, model, new_head, ignore_mismatched)
    raise_problems(problems.values(), f"{folder} cannot be loaded")
    return model
