"""What each mechanism of the library is worth: a step as it is today beside the same step without it.

    pip install '.[hf,bench]'
    python -m benchmarks.models.ablation [--quick] [--parts kernels layers models] [--studies launches ...]
    python -m benchmarks.models.ablation --tiny --device cpu     # the gates of small models; no times

Studies, and what goes in them:

    launches    the recorder of ops/core/replay.py; then also ops/core/launch.py's own launch, for Triton's
    fused8      the products that decode to e4m3 in registers: "unpack8" takes their place
    dense       the dense products that decode in registers, for few rows: "unpack" takes their place
    portable    of the portable kernel, the runs that it deals out (and with them Blackwell's tiles, which
                are Hopper's without runs), and Hopper's tiles: those of older GPUs take their place

A mode patches attributes of the library's modules while it lasts, in this process, and drops all recordings
when it begins and ends. Modes take turns on the same tensors, round by round. A ratio is the median over
rounds of without / with: at 1.10 the step takes a tenth longer without the mechanism. Before any time the
results in each mode are compared: with float32 where the subject is one product, and with those of today, bit
for bit where a mode runs the same kernels.

Subjects are products of few rows and of the shapes that users train (kernels), linear layers and a layer of
experts (layers), and whole models in eager LoRA steps: gpt-oss-20b's and Qwen3-30B-A3B's shapes with
``--layers`` of their layers and as large a part of their vocabularies (models). On an H200 everything takes
some six minutes, compilation included; what fails is reported, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import math
import statistics
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.layers import linear, lora, lora_grouped, lora_linear, moe_layer
from benchmarks.models import compile as blocks
from benchmarks.models import gpt_oss
from benchmarks.shared import harness
from torchao_mx import MXFP4, NVFP4, BlockFormat, ops
from torchao_mx.ops.core import launch, replay
from torchao_mx.ops.core.operands import Packed
from torchao_mx.ops.core.register import implementations
from torchao_mx.ops.packed_mm import op, portable
from torchao_mx.reference import Added, Rows

WORTH = 1.1  # a ratio from which on a mechanism earns its place
BF16_TOLERANCE, FP8_TOLERANCE = 2e-2, 8e-2  # relative errors to the results of today
NOISE = 5e-2  # of blocks' gradients: attention's sums have no order, and roundings add up
PARTS = ("kernels", "layers", "models")
COLUMNS = dict(
    study="study", without="without", subject="step of", time="time", with_ms="with, ms",
    without_ms="without, ms", ratio="without / with", least="least", most="most",
)  # fmt: skip
SUMMARY = dict(
    without="without", time="time", subjects="steps", least="least ratio", median="median",
    most="most", worth=f"{WORTH:g} and more",
)  # fmt: skip
Shape = lora_grouped.Shape
SHAPES = {  # of shared products: experts, K, N, top k
    "A": lora_grouped.SHAPES["A"],
    "gpt-oss gate_up": lora_grouped.SHAPES["B"],
    "gpt-oss down": Shape(32, 2880, 2880, 4, ()),
    "Qwen3 gate_up": Shape(128, 2048, 1536, 8, ()),
    "Qwen3 down": Shape(128, 768, 2048, 8, ()),
}
DENSE_SHAPES = {"Llama up": (4096, 14336), "gpt-oss q": (2880, 4096), "Qwen3 q": (2048, 4096)}
QWEN3 = dict(
    hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
)  # fmt: skip
TINY_QWEN3 = dict(
    hidden_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32,
)  # fmt: skip
WHOLE = {"gpt-oss-20b": (24, 201_088), "Qwen3-30B-A3B": (48, 151_936)}  # layers, vocabulary


# --- modes ----------------------------------------------------------------------------------------


def forget() -> None:
    """Drop every op's recordings, which repeat what was launched in the mode in which they were made."""
    for implementation in implementations.values():
        if hasattr(implementation, "forget"):
            implementation.forget()


def recordings() -> int:
    gc.collect()
    return sum(type(found) is replay._Recording for found in gc.get_objects())


@contextlib.contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """(owner, name of an attribute, its value here) for as long as it lasts."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        forget()
        try:
            yield
        finally:
            forget()


Mode = Callable[[], contextlib.AbstractContextManager]


def today() -> contextlib.AbstractContextManager:
    return patched()


# `replayed` only calls the op where a recorder is at work already; `launched` sees its own name for it, None.
_BUSY = types.SimpleNamespace(recording=object())


def without_recorder() -> contextlib.AbstractContextManager:
    return patched((replay, "launches", _BUSY))


def with_tritons_launch() -> contextlib.AbstractContextManager:
    """Without the recorder too, which would not see these launches."""
    own = (launch.launched, "__getitem__", lambda self, grid: self.kernel[grid])
    return patched((replay, "launches", _BUSY), own)


def with_strategy(change: Callable[[str, int | None], str]) -> contextlib.AbstractContextManager:
    """``change(what is chosen today, how many groups)`` in its place."""
    choose = op.choose_strategy

    def changed(
        strategy: str, compute: str, device: Any, dtype: Any, n_rows: int, n_groups: int | None,
        *rest: Any,
    ) -> str:  # fmt: skip
        chosen = choose(strategy, compute, device, dtype, n_rows, n_groups, *rest)
        return change(chosen, n_groups)

    return patched((op, "choose_strategy", changed))


def without_fused8() -> contextlib.AbstractContextManager:
    return with_strategy(lambda chosen, _: "unpack8" if chosen == "fused8" else chosen)


def without_dense_fused() -> contextlib.AbstractContextManager:
    return with_strategy(
        lambda chosen, groups: "unpack" if chosen == "fused" and groups is None else chosen
    )


def without_runs() -> contextlib.AbstractContextManager:
    def undealt(tiles: Sequence[tuple[float, portable.Tile]]) -> tuple:
        return tuple((average, tile._replace(run=0)) for average, tile in tiles)

    tiles = {major: undealt(table) for major, table in portable.TILES.items()}
    return patched((portable, "TILES", tiles), (portable, "_MMA", undealt(portable._MMA)))


def with_older_tiles() -> contextlib.AbstractContextManager:
    return patched((portable, "TILES", {}))


class Study(NamedTuple):
    """Modes, and of each mechanism the mode with it and the one without; ``tolerance`` between modes."""

    modes: dict[str, Mode]
    mechanisms: dict[str, tuple[str, str]]
    tolerance: float
    in_graph: bool


STUDIES = {
    "launches": Study(
        {
            "today": today,
            "no recorder": without_recorder,
            "Triton's launch": with_tritons_launch,
        },
        {
            "recorder": ("today", "no recorder"),
            "own launch, no recorder": ("no recorder", "Triton's launch"),
            "recorder and own launch": ("today", "Triton's launch"),
        },
        0.0,
        in_graph=False,
    ),
    "fused8": Study(
        {"today": today, "unpack8": without_fused8},
        {"fused8": ("today", "unpack8")},
        FP8_TOLERANCE,
        in_graph=True,
    ),
    "dense": Study(
        {"today": today, "unpack": without_dense_fused},
        {"dense fused": ("today", "unpack")},
        BF16_TOLERANCE,
        in_graph=True,
    ),
    "portable": Study(
        {"today": today, "no runs": without_runs, "older tiles": with_older_tiles},
        {"dealt runs": ("today", "no runs"), "Hopper's tiles": ("today", "older tiles")},
        BF16_TOLERANCE,
        in_graph=True,
    ),
}


# --- subjects -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A step, and what it computes for comparison between modes; ``check`` compares with float32.

    ``noise`` is the relative difference of two runs; ``in_graph``, whether a step is captured.
    """

    name: str
    step: Callable[[], Any]
    results: Callable[[], dict[str, torch.Tensor]]
    check: Callable[[], None] | None = None
    noise: float = 0.0
    in_graph: bool = True
    eager: bool = True


def of_variant(name: str, variant: lora.Variant, case: lora.Case) -> Subject:
    """A product with LoRA, forward + backward, over all weight sets in turn."""
    step, sets = variant.step(case.dy), itertools.cycle(range(case.n_sets))

    def results() -> dict[str, torch.Tensor]:
        leaves = variant.leaves(0)
        step(0)
        with torch.no_grad():
            found = dict(zip(("dX", "dA", "dB"), (t.grad.clone() for t in leaves), strict=True))
            return found | {"y": variant.forward(0)}

    def check() -> None:
        lora.check(variant, case)

    return Subject(name, lambda: step(next(sets)), results, check)


NO_BOUND = lora.Card(1.0, 1.0)  # shares of a bound are not asked for here


def dense_products(shape: str, rows: Sequence[int]) -> Iterator[Subject]:
    problem = lora_linear.Problem(*DENSE_SHAPES[shape])
    for m in rows:
        x, dy = problem.operands(m)
        case = problem.case(x, dy, NO_BOUND)
        yield of_variant(f"{shape}, {m} rows", problem.variant("bf16", x), case)


def grouped_products(shape: str, tokens: Sequence[int], compute: str) -> Iterator[Subject]:
    problem = lora_grouped.Problem(shape, shape=SHAPES[shape])
    for m in tokens:
        x, dy, r = problem.operands("balanced", m)
        case = problem.case("balanced", x, dy, r, NO_BOUND)
        variant = problem.variant(compute, x, r, "ablation")
        yield of_variant(f"{shape}, {compute}, {m} tokens", variant, case)


def portable_products(
    shape: str, tokens: Sequence[int], formats: Sequence[BlockFormat]
) -> Iterator[Subject]:
    """The portable kernel alone, both ways, where this card may have another for MXFP4."""
    s = SHAPES[shape]
    for fmt in formats:
        w_ENK = torch.randn(s.experts, s.n, s.k, device="cuda", dtype=torch.bfloat16) * s.k**-0.5
        pts = ops.per_tensor_scale(w_ENK, fmt) if fmt.has_per_tensor_scale else None
        w = Packed(*ops.quantize(w_ENK, fmt, per_tensor_scale=pts), pts, fmt)
        w_ENK.copy_(ops.dequantize(w.qdata, w.scale, fmt, per_tensor_scale=pts))
        for m, forward in itertools.product(tokens, (True, False)):
            r = lora_grouped.route("balanced", s, m)
            yield portable_product(
                f"{shape}, {fmt.name}, {m} tokens", w, w_ENK, r, s.top_k, forward
            )


def portable_product(
    name: str,
    w: Packed,
    w_ENK: torch.Tensor,
    r: lora_grouped.Routing,
    top_k: int,
    forward: bool,
) -> Subject:
    n_rows = len(r.order)
    columns = w.k if forward else w.n
    n_tokens = n_rows // top_k if forward else n_rows
    x = torch.randn(n_tokens, columns, device=w_ENK.device, dtype=torch.bfloat16)
    rows = Rows(r.offs, r.order if forward else None, top_k if forward else 1, n_rows)

    def product() -> torch.Tensor:
        return portable.fused_product(x, w, rows, forward, Added())

    def check() -> None:
        gathered = x[r.order_64 // top_k] if forward else x
        parts = gathered.float().split(r.sizes)
        values = (w_e.float().t() if forward else w_e.float() for w_e in w_ENK)
        want = torch.cat([part @ value for part, value in zip(parts, values, strict=True)])
        error = harness.relative_error(product(), want)
        harness.gate(f"{name}: {error:.3g}", error <= lora.BF16_TOLERANCE)

    way = "forward" if forward else "dX"
    return Subject(f"{name}, {way}", product, lambda: {"y": product()}, check, eager=False)


def linear_layers() -> Iterator[Subject]:
    """Trained weights: MXFP4 QAT and the recipe, 1,024 rows."""
    from benchmarks.layers import qat_linear, recipe_linear

    source, x, dy = linear.operands(1024, 4096, 4096)
    recipe = "NVFP4 fwd, MXFP8 bwd"
    models = {"QAT W4A4": qat_linear.prepared(source, qat_linear.CONFIGS["W4A4"])}
    models[recipe] = linear.prepared(source, recipe_linear.RECIPES[recipe])
    for name, model in models.items():
        step = linear.step_of(model, x, dy)

        def results(step: Callable = step, weight: torch.Tensor = model[0].weight) -> dict:
            step()
            return {"dW": weight.grad.clone()}

        yield Subject(f"a linear layer, {name}, 1024 rows", step, results)


def expert_layers(variant: str, tokens: Sequence[int]) -> Iterator[Subject]:
    """All of gpt-oss-20b's experts of a layer: two products, swiglu, combine."""
    module, adapters = moe_layer.variants(with_peft=False)[variant]
    for m in tokens:
        hidden, ids, weights, dout = moe_layer.inputs(m)
        step = moe_layer.step_of(module, hidden, ids, weights, dout)
        results = functools.partial(moe_layer.results, step, hidden, weights, adapters)
        yield Subject(f"gpt-oss experts, {variant}, {m} tokens", step, results, in_graph=False)


def block_steps(tokens: Sequence[int], tiny: bool, device: str) -> Iterator[Subject]:
    """Blocks of Llama-3-8B, all linears packed, with adapters."""
    case = blocks.Case("llama", "LoRA", math.inf)
    sizes = (blocks.TINY if tiny else blocks.BLOCKS)["llama"]
    module = blocks.Blocks(case, sizes, device)
    for m in tokens:
        step = blocks.Step(module, m, device)
        name = f"{blocks.LAYERS} Llama blocks, LoRA, {m} tokens"
        yield Subject(name, step, step.results, noise=NOISE, in_graph=False)


def model_config(name: str, layers: int, tiny: bool) -> Any:
    """As many layers, and that part of the vocabulary, so that head and loss keep their share of a step."""
    from transformers import GptOssConfig, Qwen3MoeConfig

    of_layers, vocabulary = WHOLE[name]
    sizes = dict(num_hidden_layers=layers, use_cache=False)
    sizes["vocab_size"] = 512 if tiny else vocabulary * layers // of_layers // 64 * 64
    if name == "Qwen3-30B-A3B":
        return Qwen3MoeConfig(**(TINY_QWEN3 if tiny else QWEN3) | sizes)
    return GptOssConfig(**gpt_oss.MODELS["tiny" if tiny else "20b"] | sizes)


def model_steps(
    name: str, variant: str, tokens: Sequence[int], args: argparse.Namespace
) -> Iterator[Subject]:
    """Eager steps of LoRA with checkpointing and AdamW, as in models/gpt_oss.py."""
    torch.manual_seed(0)
    config = model_config(name, args.layers, args.tiny)
    attention = "sdpa" if name == "Qwen3-30B-A3B" else args.attention
    model = gpt_oss.build_from(config, True, attention, args.device)
    model = gpt_oss.with_adapters(model, variant)
    for m in tokens:
        ids = torch.randint(config.vocab_size, (1, m), device=args.device)
        step = gpt_oss.trainer(model, ids, whole=False)
        first, last = step().item(), [step() for _ in range(3)][-1].item()
        # What follows trains on: later sizes begin with adapters of other tokens.
        falls = last < first < math.inf or (m != tokens[0] and math.isfinite(last))
        harness.gate(f"{name}: a loss from {first} to {last}", falls)

        def results(ids: torch.Tensor = ids) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return {"loss": gpt_oss.loss_of(model, ids, False)}

        text = f"{name}, {args.layers} layers, {variant}, {m} tokens"
        yield Subject(text, step, results, in_graph=False)


# --- what is measured of which --------------------------------------------------------------------


class Plan(NamedTuple):
    part: str
    studies: tuple[str, ...]
    subjects: Callable[[], Iterator[Subject]]


def plans(args: argparse.Namespace) -> list[Plan]:
    if args.tiny:
        tiny = [
            Plan("models", ("launches",), functools.partial(model_steps, n, gpt_oss.OURS, (32,), args))
            for n in WHOLE
        ]  # fmt: skip
        both = ("launches", "dense")
        return [*tiny, Plan("layers", both, lambda: block_steps((8,), True, args.device))]
    quick, fp8 = args.quick, "MXLoRAExperts, fp8, dX too"
    few = (16,) if quick else (1, 16, 64, 256)
    formats = (MXFP4,) if quick else (MXFP4, NVFP4)
    found = [
        Plan("kernels", ("launches", "dense"), lambda: dense_products("Llama up", few)),
        Plan("kernels", ("launches",), lambda: grouped_products("A", (256, 1024), "bf16")),
        Plan("kernels", ("launches",), lambda: grouped_products("gpt-oss gate_up", (64, 512), "bf16")),
        Plan("layers", ("launches",), linear_layers),
        Plan("layers", ("launches",), lambda: expert_layers("MXLoRAExperts", (64, 1024))),
        Plan("layers", ("launches", "fused8"), lambda: expert_layers(fp8, (1024, 4096))),
        Plan("layers", ("launches", "dense"), lambda: block_steps((64, 256), False, "cuda")),
    ]  # fmt: skip
    if not quick:
        found += [
            Plan("kernels", ("dense",), functools.partial(dense_products, shape, (16, 64, 256)))
            for shape in ("gpt-oss q", "Qwen3 q")
        ]
    gate_up = ("gpt-oss gate_up",) if quick else ("gpt-oss gate_up", "Qwen3 gate_up")
    for shape in gate_up[:1] if quick else SHAPES:
        tokens = (4096,) if quick else (512, 4096, 16384) if shape in gate_up else (512, 4096)
        subjects = functools.partial(grouped_products, shape, tokens, "fp8, dX too")
        found.append(Plan("kernels", ("fused8",), subjects))
    for name in WHOLE:
        tokens = (1024,) if quick else (1024, 4096)
        for variant, studies, sizes in (
            (gpt_oss.OURS, ("launches",), tokens),
            (gpt_oss.FP8, ("fused8",), tokens[-1:]),
        ):
            subjects = functools.partial(model_steps, name, variant, sizes, args)
            found.append(Plan("models", studies, subjects))
    for shape in gate_up:  # last: half of its time is compilation
        tokens = (4096,) if quick else (256, 4096)
        subjects = functools.partial(portable_products, shape, tokens, formats)
        found.append(Plan("kernels", ("portable",), subjects))
    return found


def compare(study: Study, subject: Subject) -> None:
    """Results in all modes.

    Raises:
        harness.WrongResult: one mode's are not those of float32, or of the first mode.
    """
    bound, want = max(study.tolerance, subject.noise), None
    for name, mode in study.modes.items():
        with mode():
            for _ in range(3):  # compiled, recorded, repeated
                got = subject.results()
            if subject.check is not None:
                subject.check()
        want = want or {key: value.float() for key, value in got.items()}
        for key, value in got.items():
            error = harness.relative_error(value, want[key])
            harness.gate(f"{subject.name}, {name}, {key}: {error:.3g} > {bound:g}", error <= bound)


def measure(name: str, study: Study, subject: Subject, rounds: int) -> list[harness.Row]:
    """A row a mechanism, eager and in a CUDA graph, whichever the study and the subject have."""
    times: dict[str, dict[str, list[float]]] = {}
    if subject.eager:
        steps = dict.fromkeys(study.modes, subject.step)
        times["eager"] = harness.turns_ms(steps, study.modes, rounds)
    if study.in_graph and subject.in_graph:
        graphs, ms = {}, harness.step_ms(subject.step, rounds=1, repeats=2)
        calls = max(1, min(8, int(4 / ms)))  # small weights rotate
        for key, mode in study.modes.items():
            with mode():
                for _ in range(3):
                    subject.step()
                graphs[key] = harness.captured_cycle(lambda _: subject.step(), calls, 1)
        in_no_mode = dict.fromkeys(graphs, contextlib.nullcontext)
        found = harness.turns_ms(graphs, in_no_mode, rounds, warmup=1)
        times["graph"] = {key: [ms / calls for ms in values] for key, values in found.items()}
    rows = []
    for time_of, of_mode in times.items():
        for mechanism, (with_it, without) in study.mechanisms.items():
            pairs = list(zip(of_mode[with_it], of_mode[without], strict=True))
            ratios = [b / a for a, b in pairs]
            rows.append(dict(
                study=name, without=mechanism, subject=subject.name, time=time_of,
                with_ms=statistics.median(a for a, _ in pairs),
                without_ms=statistics.median(b for _, b in pairs),
                ratio=statistics.median(ratios), least=min(ratios), most=max(ratios),
            ))  # fmt: skip
    return rows


@dataclass
class Results:
    """Rows, and what could not be measured."""

    device: str
    rows: list[harness.Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def run(self, plan: Plan, studies: Sequence[str], rounds: int) -> None:
        """All subjects of a plan; a fault of one study leaves the others their figures."""
        try:
            for subject in plan.subjects():
                for name in studies:
                    self.add(name, subject, rounds)
        except (Exception, harness.WrongResult) as error:
            self.fail(f"{plan.part}, {', '.join(studies)}", error)

    def add(self, name: str, subject: Subject, rounds: int) -> None:
        try:
            compare(STUDIES[name], subject)
            if self.device != "cuda":
                print(f"{subject.name}: the same in {', '.join(STUDIES[name].modes)}", flush=True)
                return
            found = measure(name, STUDIES[name], subject, rounds)
        except (Exception, harness.WrongResult) as error:
            self.fail(f"{name}: {subject.name}", error)
            return
        self.rows += found
        figures = " | ".join(f"{r['without']} ({r['time']}) {r['ratio']:.3f}" for r in found)
        print(f"[{time.monotonic() - self.start:3.0f} s] {subject.name}: {figures}", flush=True)

    def fail(self, what: str, error: BaseException) -> None:
        if not isinstance(error, harness.WrongResult):
            traceback.print_exception(error)
        self.failures.append(f"{what}: {type(error).__name__}: {lora.first_line(error)}")
        print(f"FAILED: {self.failures[-1]}", flush=True)

    def save(self, name: str, meta: harness.Row) -> None:
        seconds = time.monotonic() - self.start
        harness.save(name, meta | dict(seconds=seconds, failures=self.failures), self.rows)

    def summary(self) -> list[harness.Row]:
        rows = []
        for without, kind in dict.fromkeys((r["without"], r["time"]) for r in self.rows):
            ratios = [r["ratio"] for r in self.rows if (r["without"], r["time"]) == (without, kind)]
            worth = sum(ratio >= WORTH for ratio in ratios)
            rows.append(dict(
                without=without, time=kind, subjects=len(ratios), least=min(ratios), most=max(ratios),
                median=statistics.median(ratios), worth=f"{worth} of {len(ratios)}",
            ))  # fmt: skip
        return rows


def check_modes() -> None:
    """That the recorder records today and not without it, which a ratio of 1 would not tell."""
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    for mode, wanted in ((today, True), (without_recorder, False), (with_tritons_launch, False)):
        with mode():
            for _ in range(3):
                ops.fake_quantize(x, MXFP4)
            harness.gate(f"{mode.__name__}: recordings", (recordings() > 0) is wanted)


def parse() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--quick", action="store_true", help="a shape and a size of each")
    parser.add_argument("--layers", type=int, help="of whole models; default 8, of tiny ones 2")
    parser.add_argument("--rounds", type=int, help="turns of each mode; default 6, with --quick 3")
    parser.add_argument(
        "--attention", choices=["eager", "flex_attention"], help="gpt-oss's; default by --tiny"
    )
    parser.add_argument("--tiny", action="store_true", help="small models; gates and no result")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is for --tiny")
    return args


def main() -> None:
    args = parse()
    whole = not (args.tiny or args.quick or args.layers or args.rounds or args.attention)
    whole = whole and args.parts == list(PARTS) and args.studies == list(STUDIES)
    args.layers = args.layers or (2 if args.tiny else 8)
    args.attention = args.attention or ("eager" if args.tiny else "flex_attention")
    rounds = args.rounds or (3 if args.quick else 6)
    if args.device == "cuda":
        harness.require_gpu()
        check_modes()
    torch.manual_seed(0)
    results = Results(args.device)
    meta = dict(layers=args.layers, attention=args.attention, rounds=rounds)
    try:
        for plan in plans(args):
            studies = [name for name in plan.studies if name in args.studies]
            if plan.part in args.parts and studies:
                results.run(plan, studies, rounds)
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
                if not args.tiny:  # after each plan: a run that is cut short has its figures
                    results.save("ablation" if whole else "ablation_part", meta)
    finally:
        if results.rows:
            print(harness.markdown(results.rows, COLUMNS), "\n")
            print(harness.markdown(results.summary(), SUMMARY))
    for failure in results.failures:
        print(f"FAILED: {failure}")
    raise SystemExit(bool(results.failures))


if __name__ == "__main__":
    main()
