"""The text: bytes of files in a fixed order, in three disjoint parts, and batches of it.

The order follows a hash of each file's path, so it is the same on every machine and mixes the
folders; the cuts fall between files where a file boundary is near. A batch is a function of
(seed, part, step) alone: two arms that read the same part see the same data in the same order, and a
resumed run goes on where it stopped without any state to save.
"""

from __future__ import annotations

import hashlib
import itertools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from torchao_mx.demo.settings import DemoError

VOCAB = 256  # a token is a byte
MAX_BYTES = 64 << 20
MIN_HELDOUT_WINDOWS = 16

# Not program text: installed packages, caches, test data, code pages, help topics.
_STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_STDLIB_SKIP |= {"__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Three disjoint runs of bytes (uint8, 1-D), and where they came from."""

    name: str
    n_files: int
    pretrain: torch.Tensor
    finetune: torch.Tensor
    heldout: torch.Tensor
    digest: str

    def describe(self) -> str:
        sizes = (self.pretrain.numel(), self.finetune.numel(), self.heldout.numel())
        mb = " + ".join(f"{n / 1e6:.2f}" for n in sizes)
        return f"{self.name}, {self.n_files} files; {mb} MB to pretrain, fine-tune and hold out"

    def batch(self, phase: str, step: int, seed: int, batch: int, seq: int) -> torch.Tensor:
        """int64 ``[batch, seq + 1]`` from random places of a part, set by (seed, phase, step)."""
        part = {"pretrain": self.pretrain, "finetune": self.finetune}[phase]
        key = _hash(f"{seed}/{phase}/{step}".encode())
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        starts = torch.randint(part.numel() - seq, (batch, 1), generator=generator)
        return part[starts + torch.arange(seq + 1)].long()

    def heldout_windows(self, count: int, seq: int) -> torch.Tensor:
        """int64 ``[n, seq + 1]``: at most ``count`` windows, evenly spaced, none overlapping."""
        available = self.heldout.numel() // (seq + 1)
        n = min(count, available)
        starts = torch.arange(n)[:, None] * available // n * (seq + 1)
        return self.heldout[starts + torch.arange(seq + 1)].long()


def load_corpus(data: str | None, seq: int) -> Corpus:
    """Read the text at ``data`` (a file or a folder; None: the standard library's source).

    A folder's files are read recursively, leaving out hidden ones, those that are not UTF-8 text
    and copies of one already read; at most 64 MiB are taken.

    Raises:
        DemoError: there is nothing to read, or too little for windows of ``seq + 1`` bytes.
    """
    name, texts = _read(data)
    parts = _split(texts, (0.70, 0.20), name, seq)
    return Corpus(name, len(texts), *parts, _hash(b"".join(texts)).hex())


def load_adaptation_corpus(data: str | None, seq: int) -> Corpus:
    """The standard library's source to pretrain on, and other text to adapt to and to hold out.

    The other text is that at ``data``, read as :func:`load_corpus` does; None: the prose of Python's
    language reference, which ``help()`` shows.
    """
    code_name, code = _read(None)
    if data is None:
        from pydoc_data.topics import topics  # a few Pythons come without

        ordered = sorted(topics, key=lambda topic: _hash(topic.encode()))
        name, texts = "the prose of Python's reference", [topics[n].encode() for n in ordered]
    else:
        name, texts = _read(data)
    parts = (*_split(code, (), code_name, seq), *_split(texts, (0.80,), name, seq))
    texts = [*code, *texts]
    digest = _hash(b"".join(texts)).hex()
    return Corpus(f"{code_name}, then {name}", len(texts), *parts, digest)


def _read(data: str | None) -> tuple[str, list[bytes]]:
    """What the text is called, and its files."""
    root = Path(data or sysconfig.get_path("stdlib"))
    name = data or "the Python standard library's source"
    texts: dict[bytes, bytes] = {}  # by their hash
    left = MAX_BYTES
    for path in [root] if root.is_file() else _files(root, is_stdlib=data is None):
        try:
            with path.open("rb") as file:
                text = file.read(left)
        except OSError:
            continue
        if text and _hash(text) not in texts and _is_text(text):
            texts[_hash(text)] = text
            left -= len(text)
        if not left:
            break
    if not texts:
        raise DemoError(f"{name}: no UTF-8 text found in {root}; give a text file or a folder")
    return name, list(texts.values())


def _files(root: Path, is_stdlib: bool) -> list[Path]:
    """Files under ``root``, ordered by a hash of the path from there."""
    skip, found = _STDLIB_SKIP if is_stdlib else set(), {}
    for path in root.rglob("*.py" if is_stdlib else "*"):
        relative = path.relative_to(root)
        if not any(part in skip or part.startswith(".") for part in relative.parts):
            found[_hash(relative.as_posix().encode(errors="replace"))] = path
    return [path for _, path in sorted(found.items()) if path.is_file()]


def _is_text(text: bytes) -> bool:
    try:
        text[:-4].decode()  # a read that stops at MAX_BYTES may split the last character
    except UnicodeDecodeError as error:
        return error.start >= len(text) - 8
    return b"\0" not in text


def _split(
    texts: list[bytes], shares: tuple[float, ...], name: str, seq: int
) -> tuple[torch.Tensor, ...]:
    """Parts that begin with ``shares`` of the bytes, cut between files where that is near; then the rest."""
    ends = [0, *itertools.accumulate(map(len, texts))]
    total, cuts = ends[-1], []
    needed = int(MIN_HELDOUT_WINDOWS * (seq + 1) / (1 - sum(shares))) + 1
    if total < needed:
        raise DemoError(
            f"{name}: {total:,} bytes of text are too few; windows of --seq {seq} need at least "
            f"{needed:,}: give more text or a shorter --seq"
        )
    for share in itertools.accumulate(shares):
        exact = int(total * share)
        near = min(ends, key=lambda end: abs(end - exact))
        cuts.append(near if abs(near - exact) < 0.02 * total else exact)
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).tensor_split(cuts)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
