"""Whether a checkpoint in high precision gives a model all of its tensors, and none that it has no use for.

transformers fills what is missing at random. Which tensors feed a parameter only it knows: it renames, ties,
and merges the tensors of single experts. So its own loader is run first on tensors on ``meta``, shaped as the
file's headers say, and reports what is missing, left over or misshapen before anything is read.
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
    """Refuse a checkpoint from which ``skeleton``, a model on ``meta``, could not be loaded whole.

    Args:
        entries: of the checkpoint.
        skeleton: of the class and in the dtype that will be loaded.
        folder: of the checkpoint, for messages.
        new_head: what is outside the base model may be missing, a classifier's head on a language model.
        ignore_mismatched: tensors may have other shapes, as the user has asked for.

    Raises:
        ValueError: one line for each tensor that is missing, left over, misshapen or of integers.
    """
    problems = _dtype_problems(entries, skeleton) | _expert_problems(entries, skeleton)
    problems |= tied_problems(entries, skeleton)
    if not is_v5() and not ignore_mismatched:
        problems |= _shape_problems(entries, skeleton)
    # v4 fills what is missing or misshapen even so, in the CPU's memory: not where sizes are absurd.
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
    """What transformers' report says that must not be, a line for each tensor."""
    problems = {}
    inside = f"{model.base_model_prefix}."
    unexpected = sorted(report["unexpected_keys"])
    for name in sorted(report["missing_keys"]):
        if not new_head or name.startswith(inside):
            near = difflib.get_close_matches(name, unexpected, 1) if len(problems) < 12 else []
            kin = f", and {near[0]} is there, which the model does not have" if near else ""
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
    """Integers, or packed values, under the name of a tensor in high precision."""
    state = skeleton.state_dict()
    prefix = f"{skeleton.base_model_prefix}."
    problems = {}
    for name, entry in entries.items():
        wanted = next(
            (state[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in state), None
        )
        if prefix + name in entries:
            problems[name] = (
                f"{name}: there twice, as {prefix + name} too; export the checkpoint again"
            )
        elif wanted is not None and wanted.is_floating_point() and entry.dtype not in FLOATS:
            problems[name] = mistyped(name, entry.dtype, FLOATS)
    return problems


def _shape_problems(entries: dict[str, Entry], skeleton: PreTrainedModel) -> dict[str, str]:
    """Shapes under v4, which transposes and merges nothing."""
    return {
        name: misshapen(name, entries[name].shape, tensor.shape)
        for name, tensor in skeleton.state_dict().items()
        if name in entries and entries[name].shape != tensor.shape
    }


def _expert_problems(entries: dict[str, Entry], skeleton: PreTrainedModel) -> dict[str, str]:
    """Of tensors of single experts: transformers stacks a layer's in their order, whatever their numbers."""
    wanted = skeleton.state_dict()
    groups: dict[str, dict[str, dict[int, str]]] = {}
    for name in entries:
        if match := _NUMBERED.fullmatch(name):
            kinds = groups.setdefault(match[1], {})
            kinds.setdefault(match[3], {})[int(match[2])] = name
    problems = {}
    for stem, kinds in groups.items():
        for kind, names in kinds.items():
            # Some models have experts without some of the tensors.
            stacked = wanted.get(f"{stem}.{kind.removesuffix('.weight')}")
            experts = max(map(len, kinds.values())) if stacked is None else len(stacked)
            shape = entries[next(iter(names.values()))].shape
            for number in set(range(experts)) - names.keys():
                name = f"{stem}.{number}.{kind}"
                problems[name] = missing(name)
            for number, name in names.items():
                if number >= experts:
                    problems[name] = f"{name}: there are {experts} experts, from 0 on; {FIT}"
                elif entries[name].shape != shape:
                    problems[name] = (
                        f"{name}: has shape {entries[name].shape}, others {shape}; {FIT}"
                    )
                elif entries[name].dtype not in FLOATS:
                    problems[name] = mistyped(name, entries[name].dtype, FLOATS)
    return problems


def _dry_run(entries: dict[str, Entry], skeleton: PreTrainedModel) -> Report | None:
    """transformers' report on the file's headers; None where its loader does not run on ``meta``.

    It needs Accelerate for that, and operations that have no kernel there cannot be run. Then the report of
    the load itself decides.
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
    """Without transformers' own log and progress bar."""
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
    """``auto_class.from_pretrained(folder, **options)``, of a model in which nothing is random.

    Raises:
        ValueError: as :func:`check_complete`, by the report of the load itself; files that transformers
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
