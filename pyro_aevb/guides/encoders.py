"""Networks that turn observations into features: of events, images, sets and sequences.

Any number of leading axes (particles, rows, plates) may stand before the axes that a network reads, and they come back as they
were. Features have no meaning of their own; heads read them. Wherever there is a nonlinear network, a linear map stands beside
it: the posterior mean of a linear-Gaussian model is linear in its observations, and is then found exactly and fast.
"""

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pyro_aevb.errors import DataError, SettingError

__all__ = ["ConvEncoder", "MLPEncoder", "SequenceEncoder", "SetEncoder"]


class _LinearAndHidden(nn.Module):
    """A linear map plus hidden layers beside it; the linear map alone if there are none."""

    def __init__(self, in_features: int, num_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_features)
        layers = [layer for a, b in pairwise([in_features, *widths]) for layer in (nn.Linear(a, b), nn.SiLU())]
        # one bias is enough for the sum
        last = [nn.Linear(widths[-1], num_features, bias=False)] if widths else []
        self.hidden = nn.Sequential(*layers, *last)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch features"]:
        """Return features of vectors."""
        return self.linear(x) + self.hidden(x) if len(self.hidden) else self.linear(x)


class MLPEncoder(nn.Module):
    r"""Turn an event into features: hidden layers, and a linear map beside them.

    .. math:: h(x) = W x + b + \mathrm{MLP}(x)

    with x flattened and SiLU between the layers. A model whose posterior mean is linear in x needs :math:`W x + b` only.

    Args:
        event_shape: Shape of one event; an integer is the length of a vector, ``()`` a single number.
        num_features: Number of features.
        hidden_features: Width of each hidden layer; none of them leaves the linear map. ``None`` takes two layers as wide as the
            next power of two from the input's size, at least 64 and at most 512.

    Raises:
        SettingError: If a size is not an integer of at least 1.

    Example:
        >>> encoder = MLPEncoder((28, 28), num_features=16)
        >>> encoder(torch.zeros(5, 100, 28, 28)).shape
        torch.Size([5, 100, 16])
    """

    def __init__(
        self,
        event_shape: Sequence[int] | int,
        num_features: int = 64,
        *,
        hidden_features: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
        self.num_features = num_features
        _check_sizes(event_shape=self.event_shape, num_features=num_features, hidden_features=hidden_features)
        inputs = math.prod(self.event_shape)
        self.network = _LinearAndHidden(inputs, num_features, _widths(inputs, hidden_features))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch features"]:
        """Return the features of events.

        Args:
            x: Events, ``[..., *event_shape]``.

        Returns:
            Features, ``[..., num_features]``.

        Raises:
            DataError: If x does not end in ``event_shape``.
        """
        leading = _leading(x, self, *self.event_shape)
        return self.network(x.reshape(*leading, math.prod(self.event_shape)))


class ConvEncoder(nn.Module):
    """Turn an image into features: convolutions that halve its height and width, then a linear layer.

    Each convolution has a kernel of 3 by 3, stride 2 and a border of one zero, so that n pixels become ceil(n / 2) and every size
    works, odd ones too; SiLU follows it.

    Args:
        event_shape: Channels, height and width of an image; height and width at least 4.
        num_features: Number of features.
        channels: Channels after each convolution.

    Raises:
        SettingError: If a size is not an integer of at least 1, an image is smaller than 4 by 4 or has not three axes.

    Example:
        >>> encoder = ConvEncoder((1, 28, 20), num_features=16)
        >>> encoder(torch.zeros(5, 100, 1, 28, 20)).shape
        torch.Size([5, 100, 16])
    """

    def __init__(
        self, event_shape: Sequence[int], num_features: int = 64, *, channels: Sequence[int] = (32, 64)
    ) -> None:
        super().__init__()
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        self.num_features = num_features
        _check_sizes(event_shape=self.event_shape, num_features=num_features, channels=channels)
        if len(self.event_shape) != 3 or min(self.event_shape[1:]) < 4 or not channels:
            raise SettingError(
                f"ConvEncoder reads images [channels, height, width] of at least 4 by 4 pixels with at least one convolution, got "
                f"event_shape={list(self.event_shape)} and channels={list(channels)}. Use MLPEncoder for other events."
            )
        height, width = (math.ceil(size / 2 ** len(channels)) for size in self.event_shape[1:])
        pairs = pairwise([self.event_shape[0], *channels])
        layers = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU())]
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, num_features))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch features"]:
        """Return the features of images.

        Args:
            x: Images, ``[..., channels, height, width]``.

        Returns:
            Features, ``[..., num_features]``.

        Raises:
            DataError: If x does not end in ``event_shape``.
        """
        leading = _leading(x, self, *self.event_shape)
        features = self.network(x.reshape(math.prod(leading), *self.event_shape))
        return features.reshape(*leading, self.num_features)


class SetEncoder(nn.Module):
    r"""Turn a set of items into features that do not depend on the order of the items.

    .. math:: h(x_1, \dots, x_n) = \rho\Big(\frac{1}{n} \sum_{i=1}^n \phi(x_i),\ \log(1 + n)\Big)

    Zaheer et al. (2017, arXiv 1703.06114, Theorem 2): every continuous function of a set is some :math:`\rho` of a sum of
    :math:`\phi`. Here the sum is given as the mean and the number of items n, since the precision of a group's posterior grows
    with the size of the group while its mean does not. Each of the two networks has a linear map beside its hidden layers. The
    features of an empty set are those of a mean of 0 and n = 0.

    Args:
        in_features: Length of an item.
        num_features: Number of features.
        hidden_features: Width of each hidden layer of both networks; ``None`` sizes two by ``in_features`` as
            :class:`MLPEncoder` does.

    Raises:
        SettingError: If a size is not an integer of at least 1.

    Example:
        >>> encoder = SetEncoder(3, num_features=16)
        >>> encoder(torch.zeros(5, 100, 8, 3), mask=torch.ones(100, 8, dtype=torch.bool)).shape
        torch.Size([5, 100, 16])
    """

    def __init__(
        self, in_features: int, num_features: int = 64, *, hidden_features: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_features = num_features
        _check_sizes(in_features=in_features, num_features=num_features, hidden_features=hidden_features)
        widths = _widths(in_features, hidden_features)
        self.phi = _LinearAndHidden(in_features, num_features, widths)
        self.rho = _LinearAndHidden(num_features + 1, num_features, widths)

    def forward(
        self, x: Float[Tensor, "*batch items inputs"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*batch features"]:
        """Return the features of sets.

        Args:
            x: Items, ``[..., items, in_features]``; what stands at absent items has no influence, NaN included.
            mask: True where an item is present, ``[..., items]`` or fewer leading axes; ``None`` where all are.

        Returns:
            Features, ``[..., num_features]``.

        Raises:
            DataError: If x does not end in ``in_features`` or the mask does not fit x.
        """
        _leading(x, self, "items", self.in_features)
        absent = ~_present(x, mask)[..., None]
        count = (~absent).sum(-2).to(x.dtype)
        items = self.phi(x.masked_fill(absent, 0.0)).masked_fill(absent, 0.0)
        mean = items.sum(-2) / count.clamp(min=1.0)
        return self.rho(torch.cat([mean, count.log1p()], -1))


class SequenceEncoder(nn.Module):
    r"""Turn a sequence into features of each step that summarise what lies behind it, ahead of it, or both.

    .. math:: h_t = V \, \mathrm{GRU}(x_T, \dots, x_t) + W x_t + b

    read backward; a GRU (Cho et al. 2014, arXiv 1406.1078) of :math:`x_1, \dots, x_t` read forward; the sum of two such terms
    for both. The last present step ends a sequence: it is read backward from there, so that steps of padding change nothing.
    Absent steps before the last present one are read as zeros; give the mask as one of the inputs to tell them from observed
    zeros. Behind the end a backward reading has nothing to tell and its features are b; a forward one reads on over zeros.

    Args:
        in_features: Length of the input of one step.
        num_features: Number of features of each step.
        direction: ``"backward"`` (step t summarises the steps from t on), ``"forward"`` (up to t) or ``"both"``.
        hidden_features: Length of the recurrent state of each direction.

    Raises:
        SettingError: If a size is not an integer of at least 1 or the direction is unknown.

    Example:
        >>> encoder = SequenceEncoder(3, num_features=16)
        >>> encoder(torch.zeros(100, 8, 3)).shape, encoder.summary(torch.zeros(100, 8, 3)).shape
        (torch.Size([100, 8, 16]), torch.Size([100, 16]))
    """

    def __init__(
        self,
        in_features: int,
        num_features: int = 64,
        *,
        direction: Literal["forward", "backward", "both"] = "backward",
        hidden_features: int = 64,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_features = num_features
        self.directions = ("forward", "backward") if direction == "both" else (direction,)
        _check_sizes(in_features=in_features, num_features=num_features, hidden_features=hidden_features)
        if direction not in ("forward", "backward", "both"):
            raise SettingError(f"direction must be 'forward', 'backward' or 'both', got {direction!r}.")
        self.readers = nn.ModuleList(
            _Reader(in_features, num_features, hidden_features, is_backward=name == "backward")
            for name in self.directions
        )

    def forward(
        self, x: Float[Tensor, "*batch steps inputs"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*batch steps features"]:
        """Return the features of each step.

        Args:
            x: Sequences, ``[..., steps, in_features]``; what stands at absent steps has no influence, NaN included.
            mask: True where a step is present, ``[..., steps]`` or fewer leading axes; ``None`` where all are.

        Returns:
            Features, ``[..., steps, num_features]``.

        Raises:
            DataError: If x does not end in ``in_features``, has no steps, or the mask does not fit x.
        """
        inputs, lengths = self._flatten(x, mask)
        features = torch.stack([reader(inputs, lengths) for reader in self.readers]).sum(0)
        return features.reshape(*x.shape[:-1], self.num_features)

    def summary(
        self, x: Float[Tensor, "*batch steps inputs"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*batch features"]:
        """Return features of whole sequences.

        These are the features of the step that a direction reads last: of the first step read backward, of the last present step
        read forward, and the sum of the two terms for both directions.

        Args:
            x: As for a call.
            mask: As for a call.

        Returns:
            Features, ``[..., num_features]``.

        Raises:
            DataError: As for a call.
        """
        inputs, lengths = self._flatten(x, mask)
        last = {"forward": (lengths - 1).clamp(min=0), "backward": torch.zeros_like(lengths)}
        parts = zip(self.directions, self.readers, strict=True)
        features = torch.stack([_take(reader(inputs, lengths), last[name][:, None]) for name, reader in parts]).sum(0)
        return features.reshape(*x.shape[:-2], self.num_features)

    def _flatten(
        self, x: Tensor, mask: Tensor | None
    ) -> tuple[Float[Tensor, "flat steps inputs"], Int[Tensor, " flat"]]:
        """Return sequences with zeros at absent steps, and their lengths, with one leading axis."""
        leading = _leading(x, self, "steps", self.in_features)
        steps = x.shape[-2]
        if steps < 1:
            raise DataError(f"SequenceEncoder reads sequences of at least one step, got {list(x.shape)}.")
        present = _present(x, mask)
        numbers = torch.arange(1, steps + 1, device=x.device)
        lengths = (numbers * present).amax(-1)
        inputs = x.masked_fill(~present[..., None], 0.0)
        flat = math.prod(leading)
        return inputs.reshape(flat, steps, self.in_features), lengths.reshape(flat)


class _Reader(nn.Module):
    """One direction of reading: a GRU, and a linear map of its state and of the step's own input."""

    def __init__(self, in_features: int, num_features: int, hidden_features: int, *, is_backward: bool) -> None:
        super().__init__()
        self.is_backward = is_backward
        self.gru = nn.GRU(in_features, hidden_features, batch_first=True)
        self.project = nn.Linear(hidden_features + in_features, num_features)

    def forward(
        self, x: Float[Tensor, "flat steps inputs"], lengths: Int[Tensor, " flat"]
    ) -> Float[Tensor, "flat steps features"]:
        """Return this direction's part of the features of each step."""
        return self.project(torch.cat([self._states(x, lengths), x], -1))

    def _states(self, x: Tensor, lengths: Tensor) -> Float[Tensor, "flat steps hidden"]:
        if not self.is_backward:
            return self._run(x)
        step = torch.arange(x.shape[1], device=x.device)
        is_behind = step >= lengths[:, None]
        # padding stays behind: what a GRU reads last has no influence on what it read before
        order = torch.where(is_behind, step, lengths[:, None] - 1 - step)
        return _take(self._run(_take(x, order)), order).masked_fill(is_behind[..., None], 0.0)

    def _run(self, x: Tensor) -> Tensor:
        # nn.GRU's own call reads its parameters from a list that torch.export warns about
        weights = [getattr(self.gru, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]
        start = x.new_zeros(1, x.shape[0], self.gru.hidden_size)
        # in training mode always: there is no dropout, and cuDNN has no gradients in evaluation mode
        states, _ = torch.gru(x, start, weights, True, 1, 0.0, True, False, True)
        return states


def _take(x: Float[Tensor, "flat steps features"], steps: Int[Tensor, "flat chosen"]) -> Tensor:
    """Return chosen steps of each sequence."""
    return x.gather(1, steps[..., None].expand(-1, -1, x.shape[-1]))


def _present(x: Tensor, mask: Tensor | None) -> Bool[Tensor, "..."]:
    """Return a mask of the shape of x without its last axis, all True for ``None``.

    Raises:
        DataError: If the mask is not boolean or not of that shape; leading axes may be missing or of size 1.
    """
    shape = x.shape[:-1]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=x.device)
    missing = len(shape) - mask.dim()
    fits = 0 <= missing < len(shape) and mask.shape[-1] == shape[-1]
    fits = fits and all(size in (1, wanted) for size, wanted in zip(mask.shape, shape[missing:], strict=True))
    if mask.dtype != torch.bool or not fits:
        raise DataError(
            f"mask must be a boolean tensor {list(shape)} for x {list(x.shape)}, True where an entry is present; got "
            f"{mask.dtype} {list(mask.shape)}."
        )
    return mask.expand(shape)


def _leading(x: Tensor, encoder: nn.Module, *trailing: int | str) -> torch.Size:
    """Return the axes before the trailing ones, whose sizes are given as integers, or as a name where any will do.

    Raises:
        DataError: If x has other trailing axes.
    """
    rank = len(trailing)
    last = x.shape[x.dim() - rank :] if x.dim() >= rank else None
    if last is None or any(isinstance(size, int) and size != got for size, got in zip(trailing, last, strict=True)):
        raise DataError(
            f"{type(encoder).__name__} expects x of shape [{', '.join(map(str, ('...', *trailing)))}], got {list(x.shape)}."
        )
    return x.shape[: x.dim() - rank]


def _check_sizes(**sizes: Any) -> None:
    """Refuse sizes that are no integers of at least 1, single ones or in a sequence; ``None`` is left alone."""
    for name, given in sizes.items():
        values = given if isinstance(given, Sequence) else () if given is None else (given,)
        if not all(isinstance(value, Integral) and operator.index(value) >= 1 for value in values):
            raise SettingError(f"{name} must hold integers of at least 1, got {given!r}.")


def _widths(inputs: int, hidden_features: Sequence[int] | None) -> Sequence[int]:
    """Return the given widths, or two that fit the input: the next power of two, between 64 and 512."""
    if hidden_features is not None:
        return hidden_features
    return (min(max(1 << (inputs - 1).bit_length(), 64), 512),) * 2
