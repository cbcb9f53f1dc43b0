"""What ``compute_dtype=torch.float8_e4m3fn`` costs in accuracy: the definition against float64, on the CPU.

The weights of such a product are exact, so its error is that of rounding x row by row (and, for the
product that gives dX, the incoming gradient). The reference is bit for bit what users of the CPU get; the
GPU differs in the order of its sums. x is Gaussian, Student's t with three degrees of freedom, or Gaussian
with channels whose magnitudes are lognormal (sigma 2), as activations with outlier channels are. Prints a
table and writes ``results/fp8_accuracy.json``.
"""

from __future__ import annotations

import torch

from benchmarks.shared import harness, results
from torchao_mx import MXFP4, ops, reference
from torchao_mx.reference import Added, Rows, fp8

ROWS, K, N = 1024, 2048, 512
DISTRIBUTIONS = ("Gaussian", "Student t3", "Gaussian x lognormal channels")
COLUMNS = dict(
    x="x", dtype="rounded to", product="product", relative_error="relative error", worst_row="worst row"
)  # fmt: skip


def operand(distribution: str, columns: int) -> torch.Tensor:
    """``[ROWS, columns]`` bf16."""
    x = torch.randn(ROWS, columns)
    if distribution == "Student t3":
        x = torch.distributions.StudentT(3.0).sample((ROWS, columns))
    elif distribution != "Gaussian":
        x = x * torch.exp(2 * torch.randn(columns))
    return x.bfloat16()


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Of the whole product, and of its worst row."""
    error, size = (y.double() - exact).norm(dim=1), exact.norm(dim=1)
    return (error.norm() / size.norm()).item(), (error / size).max().item()


def main() -> None:
    torch.manual_seed(0)
    qdata, scale = ops.quantize(torch.randn(N, K) / K**0.5, MXFP4)
    w = reference.dequantize(qdata, scale, MXFP4, torch.float32).double()
    rows = []
    for distribution in DISTRIBUTIONS:
        for dtype, forward in (
            (torch.float8_e4m3fn, True),
            (torch.float8_e4m3fn, False),
            (torch.float8_e5m2, False),
        ):
            x = operand(distribution, K if forward else N)
            rows_of_x = Rows(None, None, 1, ROWS)
            y = fp8.fp8_product(x, qdata, scale, MXFP4, rows_of_x, forward, Added(), dtype)
            error, worst = relative_error(y, x.double() @ (w.T if forward else w))
            name, product = str(dtype).removeprefix("torch."), "x W^T" if forward else "x W"
            rows.append(
                dict(
                    x=distribution, dtype=name, product=product, relative_error=error, worst_row=worst
                )
            )  # fmt: skip
    meta = {"rows": ROWS, "k": K, "n": N, "device": "cpu", "torch": torch.__version__}
    results.write(results.path_of("fp8_accuracy"), meta, rows)
    shown = [row | {k: f"{row[k]:.2%}" for k in ("relative_error", "worst_row")} for row in rows]
    print(harness.markdown(shown, COLUMNS))


if __name__ == "__main__":
    main()
