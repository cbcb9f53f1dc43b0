"""Stochastic rounding in ``quantize_both``: the random numbers, the expectation, and the kernel's bytes."""

import pytest
import torch
from _grids import RCEIL, assert_same_bytes, generator, name_of, randn, special_blocks
from _quantize_both import FORMS, check, poisoned, quiet

from torchao_mx import MXFP8_E4M3, MXFP8_E5M2, QuantizeSpec, ops, reference

each_fp8 = pytest.mark.parametrize("fmt", [MXFP8_E4M3, MXFP8_E5M2], ids=name_of)


def test_words_are_philox():
    """Known answers of Random123's philox4x32-7, for counter and key zero."""
    words = reference.random_words(torch.tensor(0), (1, 4))
    assert words[0].tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    words = reference.random_words(torch.tensor(2**62 + 12345), (40, 30))
    assert words.min() >= 0 and words.max() < 2**32 and len(words.unique()) > 1190
    assert torch.equal(words[:7, :9], reference.random_words(torch.tensor(2**62 + 12345), (7, 9)))


def elements(fmt):
    """Every finite value of an 8-bit element, ascending."""
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.elem_dtype).float()
    return codes[codes.isfinite()].unique()


def chance_of_rounding_up(y, low, high, fmt):
    """Of all random numbers' share, by bisection: what rounds up with one of them does with every larger one."""
    dropped = reference.dropped_bits(fmt)
    down, up = torch.full(y.shape, -1), torch.full(y.shape, 1 << dropped)  # neither is drawn
    while (up - down > 1).any():
        middle = (down + up) // 2
        rounded = reference.round_stochastically(y, fmt, middle)
        assert ((rounded == low) | (rounded == high)).all()
        down, up = (
            torch.where(rounded == high, down, middle),
            torch.where(rounded == high, middle, up),
        )
    return 1 - up.double() / (1 << dropped)


@each_fp8
def test_expectation_is_the_value(fmt):
    """Exactly, but for fp32's subnormal values: within half of 2**-dropped_bits of the elements' distance."""
    grid = elements(fmt)
    picks = torch.linspace(0, len(grid) - 2, 15).long()
    low, high = (t.repeat_interleave(16) for t in (grid[picks], grid[picks + 1]))
    small = torch.maximum(low.abs(), high.abs()) <= 2.0**fmt.min_exponent
    assert small.any() and not small.all()
    for part, tolerance in (
        (torch.arange(16) / 16, 0),
        (torch.rand(16, generator=generator()), 0.5),
    ):
        y = low + (high - low) * part.repeat(15)
        wanted = (y.double() - low) / (high.double() - low)
        towards_zero = low < 0  # up is away from zero for the magnitude
        chance = chance_of_rounding_up(
            y, torch.where(towards_zero, high, low), torch.where(towards_zero, low, high), fmt
        )
        error = (chance - torch.where(towards_zero, 1 - wanted, wanted)).abs()
        assert (error <= small * tolerance * 2.0 ** -reference.dropped_bits(fmt) * 1.01).all()
    for random in (0, (1 << reference.dropped_bits(fmt)) - 1):  # elements stay
        exact = reference.round_stochastically(grid, fmt, torch.full(grid.shape, random))
        assert_same_bytes(exact, grid)


@each_fp8
def test_mean_of_many_seeds_is_x(fmt):
    """400 draws: the mean's error is 0.07 of what rounding to nearest makes, as it should be."""
    x, spec, draws, forms = randn(32, 64), QuantizeSpec(fmt), 400, ("row_values", "column_values")
    nearest = ops.quantize_both(x, spec, spec, forms)
    totals = [torch.zeros(32, 64, dtype=torch.float64) for _ in forms]
    for seed in range(draws):
        both = ops.quantize_both(x, spec, spec, forms, seed=torch.tensor(seed))
        for total, form in zip(totals, forms, strict=True):
            total += getattr(both, form)
    for total, form in zip(totals, forms, strict=True):
        ratio = (total / draws - x).norm() / (getattr(nearest, form) - x).norm()
        assert 0.05 < ratio < 0.09


@each_fp8
def test_seeds_decide(fmt):
    x, spec = randn(64, 64), QuantizeSpec(fmt)

    def values(seed, **kwargs):
        forms = ("row_values", "column_values")
        both = ops.quantize_both(x, spec, spec, forms, seed=torch.tensor(seed), **kwargs)
        return both.row_values, both.column_values

    assert all(map(torch.equal, values(3), values(3)))
    for a, b in zip(values(3), values(2**40 + 3), strict=True):  # both halves of the key count
        assert (a != b).float().mean() > 0.2
    index = torch.arange(63, -1, -1, dtype=torch.int32)
    assert torch.equal(values(3, index=index)[0], values(3)[0])
    one_scale = torch.full((64, 64), 1.0) + torch.rand(64, 64, generator=generator()) / 2
    both = ops.quantize_both(
        one_scale, spec, spec, ("row_values", "column_values"), seed=torch.tensor(5)
    )
    assert (both.row_values != both.column_values).float().mean() > 0.2  # drawn independently


@poisoned
@quiet
@each_fp8
@pytest.mark.parametrize("mode", ["rceil", "floor"])
def test_stochastic_rounding_of_the_kernel(kernel_device, fmt, mode):
    spec = QuantizeSpec(fmt, type(RCEIL)(mode))
    for seed, x in (
        (0, randn(70, 96)),
        (2**63 - 1, randn(33, 160)),
        (2**40 + 7, special_blocks()),
        (1, special_blocks().t()),
    ):
        row = spec if x.shape[1] % 32 == 0 else None
        forms = FORMS if row else FORMS[2:]
        check(kernel_device, x, row, spec, forms, seed=torch.tensor(seed))


@quiet
@each_fp8
def test_threshold_of_each_random_number(kernel_device, fmt):
    """The least value that an element's random bits round up from 1, and the one below it."""
    spec, dropped, seed = QuantizeSpec(fmt), reference.dropped_bits(fmt), torch.tensor(77)
    words = reference.random_words(seed, (64, 64))
    for form, random, first in (
        ("row_values", words & ((1 << dropped) - 1), (slice(None), slice(None, None, 32))),
        ("column_values", words >> (32 - dropped), (slice(None, None, 32), slice(None))),
    ):
        threshold = (1 << dropped) - random
        for below, expected in ((0, 1 + 2.0**-fmt.mantissa_bits), (1, 1.0)):
            x = 1 + (threshold - below).double() * 2.0**-23
            x[first] = fmt.elem_max  # makes the block's scale 1
            wanted = torch.full_like(x, expected)
            wanted[first] = fmt.elem_max
            check(kernel_device, x.float(), spec, spec, (form,), seed=seed)
            both = ops.quantize_both(x.float(), spec, spec, (form,), seed=seed)
            assert torch.equal(getattr(both, form).double(), wanted)
