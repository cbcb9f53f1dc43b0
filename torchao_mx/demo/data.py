"""The text: bytes of files in a fixed order, in three disjoint parts, and batches of it.

The order follows a hash of each file's path, so it is the same on every machine and mixes the
folders; the cuts fall between files where a file boundary is near. A batch is a function of
(seed, phase, step) alone: two arms that share a phase name see the same data in the same order, and
a resumed run goes on where it stopped without any state to save.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from torchao_mx.demo.settings import UsageError

VOCAB = 256  # a token is a byte

PRETRAIN_SHARE, FINETUNE_SHARE = 0.70, 0.20  # and the rest is held out
ADAPT_SHARE = 0.80  # of text that is not pretrained on; the rest is held out
MAX_BYTES = 64 << 20
MIN_HELDOUT_WINDOWS = 16

_STDLIB = "the Python standard library's source"
_HELP = "the prose of Python's language reference"

# Not prose or program text: installed packages, caches, test data, code pages, help topics.
_STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
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
        key = hashlib.sha256(f"{seed}/{phase}/{step}".encode()).digest()
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
        UsageError: there is nothing to read, or too little for windows of ``seq + 1`` bytes.
    """
    texts = _read(data)
    pretrain, finetune, heldout = _split(texts, (PRETRAIN_SHARE, FINETUNE_SHARE), data, seq)
    return Corpus(_name(data), len(texts), pretrain, finetune, heldout, _digest(texts))


def load_adaptation_corpus(data: str | None, seq: int) -> Corpus:
    """The standard library's source to pretrain on, and other text to adapt to and to hold out.

    The other text is that at ``data``, read as :func:`load_corpus` does; None: the prose of Python's
    language reference, which ``help()`` shows.

    Raises:
        UsageError: as :func:`load_corpus`.
    """
    code, texts = _read(None), _help_topics() if data is None else _read(data)
    (pretrain,) = _split(code, (), None, seq)
    finetune, heldout = _split(texts, (ADAPT_SHARE,), data, seq)
    name = f"{_STDLIB}, then {_HELP if data is None else _name(data)}"
    count, digest = len(code) + len(texts), _digest([*code, *texts])
    return Corpus(name, count, pretrain, finetune, heldout, digest)


def _name(data: str | None) -> str:
    return _STDLIB if data is None else data


def _flag(data: str | None) -> str:
    """The name in an error message."""
    return _STDLIB if data is None else f"--data {data}"


def _digest(texts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(texts)).hexdigest()


def _read(data: str | None) -> list[bytes]:
    root = Path(data) if data is not None else Path(sysconfig.get_path("stdlib"))
    texts = _read_texts(_text_paths(root, stdlib=data is None), root, _flag(data))
    if not texts:
        raise UsageError(
            f"{_flag(data)}: no UTF-8 text found in {root}; give a text file or a folder"
        )
    return texts


def _help_topics() -> list[bytes]:
    """In the order of a hash of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            f"this Python comes without {_HELP} (pydoc_data); give text to adapt to with --data"
        ) from error
    return [topics[name].encode() for name in sorted(topics, key=lambda n: _hash(n.encode()))]


def _split(
    texts: list[bytes], shares: tuple[float, ...], data: str | None, seq: int
) -> list[torch.Tensor]:
    """The texts as parts that begin with ``shares`` of the bytes; the last part is the rest."""
    raw = b"".join(texts)
    needed = int(MIN_HELDOUT_WINDOWS * (seq + 1) / (1 - sum(shares))) + 1
    if len(raw) < needed:
        raise UsageError(
            f"{_flag(data)}: {len(raw):,} bytes of text are too few; windows of --seq {seq} need at "
            f"least {needed:,}: give more text or a shorter --seq"
        )
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return list(tokens.tensor_split(_cuts([len(t) for t in texts], shares)))


def _text_paths(root: Path, stdlib: bool) -> list[Path]:
    """Files under ``root``, ordered by a hash of the path from there."""
    if root.is_file():
        return [root]
    paths = []
    for folder, subfolders, files in os.walk(root):
        skip = _STDLIB_SKIP if stdlib else frozenset()
        subfolders[:] = [d for d in subfolders if d not in skip and not d.startswith(".")]
        names = (f for f in files if not f.startswith("."))
        paths += [Path(folder, f) for f in names if not stdlib or f.endswith(".py")]

    def key(path: Path) -> bytes:
        return _hash(path.relative_to(root).as_posix().encode(errors="replace"))

    return sorted((p for p in paths if p.is_file()), key=key)


def _read_texts(paths: list[Path], root: Path, flag: str) -> list[bytes]:
    texts, seen, total = [], set(), 0
    for path in paths:
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES - total)
        except OSError as error:
            if path == root:
                raise UsageError(f"{flag}: {error.strerror}") from error
            continue
        mark = _hash(text)
        if not text or mark in seen or not _is_text(text):
            continue
        seen.add(mark)
        texts.append(text)
        total += len(text)
        if total >= MAX_BYTES:
            break
    return texts


def _is_text(text: bytes) -> bool:
    if b"\0" in text:
        return False
    try:
        text[:-4].decode()  # a read that stops at MAX_BYTES may split the last character
    except UnicodeDecodeError as error:
        return error.start >= len(text) - 8
    return True


def _cuts(sizes: list[int], shares: tuple[float, ...]) -> tuple[int, ...]:
    """Where each part but the first begins; between files where that is near."""
    ends = [0, *itertools.accumulate(sizes)]
    total = ends[-1]

    def cut(share: float) -> int:
        exact = int(total * share)
        near = min(ends, key=lambda end: abs(end - exact))
        return near if abs(near - exact) < 0.02 * total else exact

    return tuple(map(cut, itertools.accumulate(shares)))


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
