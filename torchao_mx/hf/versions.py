"""Find which transformers is installed, and refuse versions that do not work."""

from __future__ import annotations

import re

SUPPORTED = "transformers 4.57.6, or 5.8 – 5.23"


def is_v5() -> bool:
    """Whether transformers' major version is 5 or later.

    Raises:
        ImportError: transformers is missing, or its version lacks the hooks used here.
    """
    try:
        from transformers import __version__ as version
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            f"torchao_mx.hf reads and writes transformers models, but transformers is not installed; it "
            f"works with {SUPPORTED}: pip install 'transformers>=5.8,<5.24'"
        ) from error
    return is_v5_version(version)


def is_v5_version(version: str) -> bool:
    """:func:`is_v5` for a version string such as "5.23.0"."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if not ((4, 57, 6) <= numbers < (5,) or numbers >= (5, 8)):
        raise ImportError(
            f"torchao_mx.hf works with {SUPPORTED}, but transformers {version} is installed: pip install "
            f"'transformers>=5.8,<5.24'"
        )
    return numbers >= (5,)
