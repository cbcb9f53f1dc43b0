"""What is wrong with a checkpoint: one error of it all, in the same words wherever it is found."""

from __future__ import annotations

from collections.abc import Collection

FIT = "use the config.json of this checkpoint, or export the tensor again"
_LINES = 12


def listed(lines: list[str]) -> str:
    """A list for a message, cut where it grows long."""
    more = [f"... and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
    return "\n".join([*lines[:_LINES], *more])


def raise_problems(problems: Collection[str], what: str) -> None:
    """One error of all ``problems``, if there are any.

    Raises:
        ValueError: there are.
    """
    if problems:
        raise ValueError(f"{what}:\n{listed(list(problems))}")


def missing(name: str, kin: str = "") -> str:
    return f"{name}: missing{kin}; download or export the checkpoint again"


def unplaced(name: str) -> str:
    return (
        f"{name}: the model of config.json has no place for it; use the config.json of this checkpoint, "
        f"or remove the tensor"
    )


def misshapen(name: str, found: object, wanted: tuple[int, ...]) -> str:
    return f"{name}: has shape {found} and config.json asks for {tuple(wanted)}; {FIT}"


def mistyped(name: str, found: str, wanted: tuple[str, ...]) -> str:
    return f"{name}: has dtype {found} and needs {' or '.join(wanted)}; export it again"
