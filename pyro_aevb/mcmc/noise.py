r"""Random numbers of a row: the same whatever rows stand beside it, in whatever chunk, on whatever machine.

A generator with a state hands out its numbers in the order in which they are asked for, so that a row's numbers would change with
the rows before it. A counter-based generator is a function of a key and a counter instead: Philox4x32-10 of Salmon, Moraes, Dror
and Shaw (2011, "Parallel random numbers: as easy as 1, 2, 3") scrambles 128 bits of counter under 64 bits of key. Here the key is
the seed and the counter is (place in the row's draw, step, row, stream). Normals come from pairs of uniforms by Box and Muller
(1958). Everything is computed in float64 and rounded once, so that a type has the numbers of another but for rounding.
"""

import enum
import math
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["RowNoise", "Stream", "philox"]

Word: TypeAlias = Any
"""An integer or an int64 tensor of integers, from 0 to 2^32 - 1."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1
_NUM_ROUNDS = 10
_NO_ROW = _MASK  # in the place of a row's number: what belongs to no row
_FAMILY = _MASK  # in the place of a stream: seeds of forks


class Stream(enum.IntEnum):
    """What a number is for. Numbers of two streams are independent; a stream is read at each step once."""

    MOMENTUM = 0
    ACCEPT = 1
    JITTER = 2
    WARM_UP_MOMENTUM = 3
    WARM_UP_ACCEPT = 4
    WARM_UP_JITTER = 5
    SEARCH_MOMENTUM = 6
    START = 7
    RESAMPLING = 8
    PILOT_START = 9
    PILOT_MOMENTUM = 10
    PILOT_ACCEPT = 11
    PROPOSAL = 12
    LENGTH_MOMENTUM = 13


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    r"""Scramble a counter by the ten rounds of Philox4x32 (Salmon et al. 2011, section 3.3).

    A round takes :math:`(c_0, c_1, c_2, c_3)` to :math:`(\mathrm{hi}(M_1 c_2) \oplus c_1 \oplus k_0,\ \mathrm{lo}(M_1 c_2),\
    \mathrm{hi}(M_0 c_0) \oplus c_3 \oplus k_1,\ \mathrm{lo}(M_0 c_0))`, and the key grows by a constant after each.

    Args:
        counter: Four words, which broadcast against each other; the first and the third are of one kind.
        key: Two words, as integers.

    Returns:
        Four words, uniform and independent over counters and keys for all that tests can tell.

    Example:
        >>> [f"{word:08x}" for word in philox((0, 0, 0, 0), (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # int64 products overflow into the sign: their 64 bits are right, and the mask drops the copies of the sign bit that the
        # shift brings in. Low words are not masked before they are multiplied, and what can be is done in place: thrice as fast.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (second >> 32) ^ c1, (first >> 32) ^ c3
        c0 ^= k0
        c2 ^= k1
        c0 &= _MASK
        c2 &= _MASK
        c1, c3 = second, first
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


class RowNoise:
    """Numbers for rows, each a function of (seed, row, stream, step, place in the row's draw) alone.

    Args:
        seed: Any integer; its lowest 64 bits count.
        rows: Index of each row in the whole batch, from 0 to 2^32 - 2.
        dtype: Type of what is drawn.
        device: Where it is drawn; ``None`` for the device of ``rows``.

    Example:
        >>> noise = RowNoise(0, torch.arange(10), dtype=torch.float64)
        >>> draw = noise.normal(Stream.MOMENTUM, 3, 2, 5)
        >>> draw.shape
        torch.Size([2, 10, 5])
        >>> torch.equal(noise.rows(slice(4, 6)).normal(Stream.MOMENTUM, 3, 2, 5), draw[:, 4:6])
        True
    """

    def __init__(
        self, seed: int, rows: Int[Tensor, " rows"], *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        self.seed = seed & (2**64 - 1)
        self.indices = rows.to(device=device, dtype=torch.int64)
        self.dtype = dtype

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.indices)

    @property
    def _key(self) -> tuple[int, int]:
        return self.seed & _MASK, self.seed >> 32

    def rows(self, index: slice | Int[Tensor, " part"]) -> "RowNoise":
        """Return the noise of some of the rows."""
        return RowNoise(self.seed, self.indices[index], dtype=self.dtype)

    def fork(self, number: int) -> "RowNoise":
        """Return noise for the same rows that is independent of this one and of other numbers': one for each global draw, say."""
        low, high, _, _ = philox((number & _MASK, number >> 32 & _MASK, _NO_ROW, _FAMILY), self._key)
        return RowNoise(low | high << 32, self.indices, dtype=self.dtype)

    def normal(self, stream: int, step: int, num_chains: int, dim: int) -> Float[Tensor, "chains rows dim"]:
        """Draw standard normals; a chain's numbers do not depend on how many chains there are."""
        num_pairs = (dim + 1) // 2
        first, second = self._uniforms(stream, step, num_chains, num_pairs)
        radius, angle = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        return pairs.flatten(-2)[..., :dim].to(self.dtype)

    def uniform(self, stream: int, step: int, num_chains: int) -> Float[Tensor, "chains rows"]:
        """Draw from the open interval between 0 and 1."""
        return _below_one(self._uniforms(stream, step, num_chains, 1)[0][..., 0], self.dtype)

    def shared_uniform(self, stream: int, step: int) -> float:
        """Draw one number in (0, 1) that all rows share."""
        words = philox((0, step, _NO_ROW, stream), self._key)
        return _to_uniform(words[0], words[1])

    def _uniforms(self, stream: int, step: int, num_chains: int, num_places: int) -> tuple[Tensor, Tensor]:
        """Return two float64 uniforms for each (chain, row, place)."""
        places = torch.arange(num_chains * num_places, device=self.indices.device).reshape(num_chains, 1, num_places)
        words = philox((places, step, self.indices[:, None], stream), self._key)
        return _to_uniform(words[0], words[1]), _to_uniform(words[2], words[3])


def _to_uniform(high: Word, low: Word) -> Any:
    """Return the middle of one of 2^52 equal parts of (0, 1), in float64: neither 0 nor 1."""
    bits = (high << 20) | (low >> 12)
    exact = bits.double() if isinstance(bits, Tensor) else bits  # an integer tensor and a float make the default type
    return (exact + 0.5) * 2.0**-52


def _below_one(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a type, but not to 1."""
    return uniform.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)
