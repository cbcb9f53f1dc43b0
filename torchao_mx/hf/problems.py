"""Report all problems of a checkpoint in one error, in the same words wherever they are found."""

from __future__ import annotations

from collections.abc import Collection

FIT = "use the config.json of this checkpoint, or export the tensor again"
_LINES = 12


def listed(lines: list[str]) -> str:
    """Join lines for a message; a long list is cut."""
    more = [f"... and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
    return "\n".join([*lines[:_LINES], *more])


def raise_problems(problems: Collection[str], what: str) -> None:
    """Raise one error that lists ``problems``, if there are any.

    Raises:
        ValueError: ``problems`` is not empty.
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
    return f"{name}: has shape {found}, but config.json asks for {tuple(wanted)}; {FIT}"


def mistyped(name: str, found: str, wanted: tuple[str, ...]) -> str:
    return f"{name}: has dtype {found}, but needs {' or '.join(wanted)}; export it again"
