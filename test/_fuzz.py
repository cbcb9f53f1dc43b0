"""Fuzzers: cases run one after another in a process of their own, judged, counted and reported.

A case ends as one of :data:`GOOD` or as a failure, which has a kind: a crash, a hang, an exception of a type that
is not documented, what a fuzzer's own oracle says. Failures do not end a run: it counts all of them, tries with
fewer mutations what failed, and raises at the end with a case of each kind that ``--fuzz-case`` runs again.
"""

import ast
import contextlib
import faulthandler
import io
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import hypothesis
import torch

REFUSALS = (ValueError, TypeError, NotImplementedError, OSError)
SHARE = 0.95  # of refusals that name a file or tensor and a remedy
MEMORY = 3 << 30  # bytes that a case may have beyond what the process holds at the start
# What a refusal tells its reader to do: an imperative where a clause begins, and what it is done to.
REMEDY = re.compile(
    r"(?:^|[;:,.(]\s+|\b(?:or|and|then|please)\s+)"
    r"(use|give|pass|download|export|save|load|remove|delete|replace|rename|restore|install|choose|free|set|name|"
    r"write|point|copy|convert|quantize|merge|make|add|leave|untie|take|check|say|call|put|move|train|correct|wait|"
    r"skip|pad|serve|report|pack|view)\b\s+\S",
    re.IGNORECASE | re.MULTILINE,
)
# A file or a tensor that is missing from the folder.
MISSING = re.compile(r"\bmodel\.layers\.\d+\.\w+|[^\s/]+\.(safetensors|json)\b")


class Verdict(NamedTuple):
    kind: str
    text: str = ""


LOADED, REFUSED = "loaded", "refused"
VAGUE = "refused, without file, tensor or remedy"
GOOD = (LOADED, REFUSED, VAGUE)


def judge_refusal(error, names):
    """The verdict on an exception: of a documented type, that names one of ``names`` and says what to do."""
    said = str(error)
    if not isinstance(error, REFUSALS):
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "torchao_mx" in f.filename]
        places = [
            f"{Path(f.filename).name}:{f.lineno}, {f.name}" for f in [*ours[-1:], *frames[-1:]]
        ]
        return Verdict(type(error).__name__, "\n".join([said[:600], *places]))
    return judge_message(said, names, type(error).__name__)


def judge_message(said, names, what=""):
    named = any(name in said for name in names if name) or MISSING.search(said)
    kind = REFUSED if named and REMEDY.search(said) else VAGUE
    return Verdict(kind, f"{what}: {said[:600]}")


@contextlib.contextmanager
def listening():
    """All that is printed, warned of and logged, as a StringIO."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    root = logging.getLogger()
    transformers = logging.getLogger("transformers")
    for logger in (root, transformers):
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(said):
            warnings.simplefilter("always")
            yield said
            for warning in caught:
                said.write(f"{warning.message}\n")
    finally:
        for logger in (root, transformers):
            logger.removeHandler(handler)


@contextlib.contextmanager
def unprivileged(folder, needed):
    """As a user whom file modes bind, which root is not, in the user's own ``folder``."""
    if not needed or os.geteuid() != 0:
        yield
        return
    nobody = 65534
    for path in [*folder.rglob("*"), folder]:
        os.chown(path, nobody, nobody, follow_symlinks=False)
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)


def _serve(connection, run):
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    sys.stdin = open(os.devnull)  # noqa: SIM115  a question would wait for ever
    log = open(os.environ["FUZZ_LOG"], "w")  # noqa: SIM115
    for stream in (1, 2):  # what transformers prints is not this test's to show
        os.dup2(log.fileno(), stream)
    faulthandler.enable(log, all_threads=False)
    faulthandler.register(signal.SIGUSR1, log, all_threads=False)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    while True:
        case = connection.recv()
        try:
            verdict = once(run, *case)
        except BaseException as error:
            verdict = Verdict(f"{type(error).__name__} of the fuzzer", traceback.format_exc())
        connection.send(verdict)


def once(run, *case):
    """``run`` of one case in a folder of its own, which every user can reach."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        Path(folder).chmod(0o755)
        return run(Path(folder), *case)


class Worker:
    """A process that runs ``run(folder, *case) -> Verdict``, replaced when it dies or hangs.

    Args:
        run: called in a fork of this process, with an empty folder.
        seconds: after which a case hangs.
    """

    def __init__(self, run, seconds=60):
        self.run, self.seconds, self.process = run, seconds, None

    def __call__(self, *case):
        if self.process is None:
            self._start()
        self.connection.send(case)
        try:
            if self.connection.poll(self.seconds):
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.close()
            name = signal.Signals(-code).name if code < 0 else f"exit {code}"
            return Verdict(f"crash: {name}", self.log.read_text()[-2000:])
        os.kill(self.process.pid, signal.SIGUSR1)  # prints where it is
        self.process.join(1)
        self.close()
        return Verdict("hang", self.log.read_text().rpartition("most recent call first")[2][:1500])

    def _start(self):
        handle, name = tempfile.mkstemp(prefix="fuzz-log-")
        os.close(handle)
        self.log = Path(name)
        os.environ["FUZZ_LOG"] = name
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forks beside threads, idle here
            self.process = context.Process(target=_serve, args=(other, self.run), daemon=True)
            self.process.start()
        other.close()

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def fuzz(request, run, cases, examples, seconds=60):
    """Run ``examples`` of the strategy ``cases`` of tuples ``(*what, mutations)``, or those of the options.

    Args:
        request: pytest's, with the options ``--fuzz``, ``--fuzz-seed`` and ``--fuzz-case``.
        run: ``(folder, *case) -> Verdict``, see :class:`Worker`.
        cases: a hypothesis strategy.
        examples: how many where no option says so.
        seconds: that a case may take.
    """
    torch.set_num_threads(1)  # a fork does not have the threads of this process, nor their locks
    worker = Worker(run, seconds)
    option = request.config.getoption
    given = option("--fuzz-case")
    if given:
        verdict = worker(*ast.literal_eval(given))
        worker.close()
        print(verdict.kind, verdict.text, sep="\n")
        assert verdict.kind in GOOD, verdict
        return
    counts, found = Counter(), defaultdict(list)

    @hypothesis.seed(option("--fuzz-seed"))
    @hypothesis.settings(
        max_examples=option("--fuzz") or examples, derandomize=False, database=None, deadline=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(cases)
    def go(case):
        verdict = worker(*case)
        kind = verdict.kind
        counts[kind] += 1
        if kind not in (LOADED, REFUSED):
            found[kind].append((case, verdict.text))

    try:
        go()
        report(request, counts, found, worker)
    finally:
        worker.close()


def smaller(case, kind, worker):
    """A case with some of the mutations, that still fails so."""
    *what, mutations = case
    for i in range(len(mutations)):
        fewer = (*what, mutations[:i] + mutations[i + 1 :])
        if len(mutations) > 1 and worker(*fewer).kind == kind:
            return smaller(fewer, kind, worker)
    return case


def report(request, counts, found, worker):
    total = sum(counts.values())
    refusals = counts[REFUSED] + counts[VAGUE]
    share = counts[REFUSED] / refusals if refusals else 1.0
    lines = [f"{total} cases: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())]
    lines.append(f"{share:.1%} of {refusals} refusals name a file or tensor and a remedy")
    all_of_them = request.config.getoption("--fuzz-all")
    for kind, cases in sorted(found.items(), key=lambda item: (item[0] == VAGUE, -len(item[1]))):
        if kind == VAGUE and share >= SHARE and not all_of_them:
            continue
        lines += ["", f"{kind} ({len(cases)})"]
        cases = sorted(cases, key=lambda case: len(repr(case[0])))
        for case, text in cases if all_of_them else cases[:1]:
            case = case if all_of_them or kind in ("hang", VAGUE) else smaller(case, kind, worker)
            lines += [f"--fuzz-case {str(case)!r}", text]
    summary = "\n".join(lines)
    print(summary)
    failures = total - sum(counts[kind] for kind in GOOD)
    few = counts[VAGUE] <= 1  # of the few cases of CI, one is more than the share
    assert not failures and (few or share >= SHARE), summary
