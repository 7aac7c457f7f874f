"""Row noise: Random123's known answers, the distributions that are claimed, and independence of rows, steps, streams and chains."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_aevb.mcmc.noise import RowNoise, Stream, _below_one, _to_uniform, philox

ONES = 0xFFFFFFFF
KNOWN = {  # Random123-1.14, kat_vectors, philox4x32 10
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def noise(num_rows=200, *, seed=0, dtype=torch.float64):
    return RowNoise(seed, torch.arange(num_rows), dtype=dtype)


@pytest.mark.parametrize("name", KNOWN)
def test_philox_gives_the_known_answers(name):
    counter, key, answer = KNOWN[name]
    assert philox(counter, key) == answer
    words = philox(tuple(torch.tensor([word, 1]) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == answer


def test_philox_of_tensors_is_philox_of_their_elements():
    rows, places = torch.tensor([0, 7, ONES])[:, None], torch.tensor([1, ONES - 1])
    words = philox((places, 5, rows, ONES), (ONES, 3))
    for i, row in enumerate(rows[:, 0].tolist()):
        for j, place in enumerate(places.tolist()):
            assert tuple(int(word[i, j]) for word in words) == philox((place, 5, row, ONES), (ONES, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_normal(dtype):
    draw = noise(1000, dtype=dtype).normal(Stream.MOMENTUM, 0, 20, 5)
    assert draw.dtype == dtype
    assert draw.shape == (20, 1000, 5)
    assert stats.kstest(draw.flatten().double().numpy(), "norm").pvalue > 1e-3
    n = draw.numel()
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)]:
        assert abs(draw.double().pow(power).mean() - mean) < 4 * math.sqrt(variance / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_uniform_and_open(dtype):
    draw = noise(5000, dtype=dtype).uniform(Stream.ACCEPT, 0, 20)
    assert draw.shape == (20, 5000)
    assert stats.kstest(draw.flatten().double().numpy(), "uniform").pvalue > 1e-3
    assert 0 < draw.min() < 1e-4
    assert 1 - 1e-4 < draw.max() < 1


def test_the_outermost_uniforms_are_neither_0_nor_1():
    largest = _to_uniform(torch.tensor([ONES]), torch.tensor([ONES]))
    assert float(largest) == 1 - 2.0**-53
    assert _to_uniform(0, 0) == 2.0**-53
    assert _below_one(largest, torch.float32) == 1 - 2.0**-24
    assert _below_one(largest, torch.float64) == largest


def test_shared_uniforms_are_uniform_and_know_no_row():
    draw = [noise(3).shared_uniform(Stream.JITTER, step) for step in range(5000)]
    assert stats.kstest(draw, "uniform").pvalue > 1e-3
    assert draw[:50] == [noise(700).shared_uniform(Stream.JITTER, step) for step in range(50)]
    assert draw[0] != noise(3, seed=1).shared_uniform(Stream.JITTER, 0)


def test_what_a_number_depends_on():
    draw = noise().normal(Stream.MOMENTUM, 3, 4, 5)
    assert torch.equal(noise().normal(Stream.MOMENTUM, 3, 9, 5)[:4], draw)
    assert torch.equal(noise(50).normal(Stream.MOMENTUM, 3, 4, 5), draw[:, :50])
    assert torch.equal(noise().rows(slice(30, 37)).normal(Stream.MOMENTUM, 3, 4, 5), draw[:, 30:37])
    index = torch.tensor([150, 3, 3])
    assert torch.equal(noise().rows(index).normal(Stream.MOMENTUM, 3, 4, 5), draw[:, index])
    assert torch.equal(
        noise().rows(slice(100, 200)).rows(index[1:]).uniform(0, 0, 1), noise().uniform(0, 0, 1)[:, [103] * 2]
    )
    assert torch.equal(noise(dtype=torch.float32).normal(Stream.MOMENTUM, 3, 4, 5), draw.float())


def test_all_numbers_differ():
    """Draws for seeds, forks, streams and steps: no two of the 96,000 numbers are equal."""
    sources = [noise(), noise(seed=1), noise(seed=2**40), noise().fork(0), noise().fork(1), noise(seed=1).fork(0)]
    draws = [
        source.normal(stream, step, 4, 5)
        for source in sources
        for stream in (Stream.MOMENTUM, Stream.START)
        for step in (0, 1)
    ]
    assert torch.stack(draws).unique().numel() == len(draws) * 4 * 200 * 5


AXES = ("chains", "rows", "dim", "steps", "streams", "seeds", "forks")


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_uncorrelated(axis):
    """Correlation of numbers that lie side by side along an axis, of values and of squares: normal about 0."""
    shape = (20, 200, 9)
    source = noise()
    pairs = {
        "steps": lambda i: source.normal(0, i, 20, 9),
        "streams": lambda i: source.normal(i, 0, 20, 9),
        "seeds": lambda i: noise(seed=i).normal(0, 0, 20, 9),
        "forks": lambda i: source.fork(i).normal(0, 0, 20, 9),
    }
    if axis in pairs:
        first, second = pairs[axis](0), pairs[axis](1)
    else:
        draw, along = source.normal(0, 0, 20, 9), AXES.index(axis)
        first, second = (draw.narrow(along, start, shape[along] - 1) for start in (0, 1))
    for transform in (lambda x: x, lambda x: (x**2 - 1) / math.sqrt(2)):
        product = (transform(first) * transform(second)).flatten()
        assert abs(product.mean()) < 4 / math.sqrt(len(product)), axis


def test_pairs_of_box_and_muller_are_independent():
    """The two normals of a pair share radius and angle: a chi-square test over cells of their quantiles."""
    draw = stats.norm.cdf(noise(2000).normal(0, 0, 20, 2).reshape(-1, 2).numpy())
    table = np.histogram2d(draw[:, 0], draw[:, 1], bins=10, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.flatten()).pvalue > 1e-3


def test_a_negative_seed_and_a_large_one_are_seeds():
    draws = [noise(seed=seed).normal(0, 0, 1, 1) for seed in (-1, 2**63, 0)]
    assert torch.stack(draws).unique().numel() == 600
