"""Observations as networks read them: standardised, missing entries zero, known from a mask."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_aevb.errors import DataError, ModelError
from pyro_aevb.program.divergence import elementwise
from pyro_aevb.program.structure import Site

__all__ = ["STANDARDISING_ROWS", "Input", "Observation", "Scale", "read_scale"]

_LARGEST = 10.0
"""Standardised inputs are cut here: an outlier in new data stays near what the network has seen."""

_MOST_CLASSES = 100
"""Whole numbers of an argument below this are classes, one input each; others are numbers."""

_SMALLEST_IMAGE = 4
"""Pixels of a side below which an event of three dimensions is read as a vector."""

_MOST_EVENT_DIMS = 3
"""Events of more dimensions (volumes, videos) have no encoder of ours."""

STANDARDISING_ROWS = 1000
"""Rows that means and standard deviations are computed from."""


class Observation(NamedTuple):
    """What a batch says at one source.

    Attributes:
        value: In canonical layout, ``[rows, inner plates, *event]``; entries that the mask leaves out may be NaN.
        mask: Which entries are known, of the value's shape; ``None`` where all are.
    """

    value: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Scale:
    """How a source's values become numbers of comparable size.

    Attributes:
        num_classes: Number of classes, one input each; 0 for numbers.
        has_number: Whether classes are read as a number too, so that one that the example lacks is not lost.
        is_count: Whether to take log(1 + x).
        is_positive: Whether to take log(x).
        is_bounded: Whether values lie between 0 and 1 or at its ends.
    """

    num_classes: int = 0
    is_count: bool = False
    is_bounded: bool = False
    has_number: bool = False
    is_positive: bool = False


def read_scale(site: Site | None, example: Observation) -> Scale:
    """Choose how to read a source: by the support of an observed site, by the values of an argument (``None``)."""
    known = example.value if example.mask is None else example.value[example.mask]
    if site is None:
        if known.is_floating_point() or known.dtype == torch.bool or not known.numel() or (known < 0).any():
            return Scale(is_bounded=known.dtype == torch.bool)
        largest = int(known.max())
        return Scale(num_classes=largest + 1, has_number=True) if largest < _MOST_CLASSES else Scale(is_count=True)
    support: Any = elementwise(site.support)
    if site.family == "Categorical":
        return Scale(num_classes=int(torch.as_tensor(support.upper_bound).max()) + 1)
    if support.is_discrete:
        ends_at = getattr(support, "lower_bound", 0 if isinstance(support, constraints.multinomial) else None)
        is_count = ends_at is not None and bool((torch.as_tensor(ends_at) >= 0).all())
        return Scale(is_count=is_count, is_bounded=support in (constraints.boolean, constraints.one_hot))
    lower, has_upper = getattr(support, "lower_bound", None), hasattr(support, "upper_bound")
    if lower is not None and not has_upper and bool((torch.as_tensor(lower) == 0).all()):
        return Scale(is_positive=bool((known > 0).all()), is_count=not bool((known > 0).all()))
    return Scale(is_bounded=support is constraints.unit_interval)


class Input(nn.Module):
    r"""Makes a source's observations inputs of a network: :math:`(t(x) - m) / s`.

    The function t is log(1 + x) for counts, log x for positive numbers (log(1 + x) where the example holds zeros), else x.

    Mean m and standard deviation s are buffers, computed once from an example, missing entries left out. The deviation of
    bounded data is floored at 1/4 (a pixel that is nearly always off is no large input when it is on), that of constants is 1.

    Args:
        name: The source, for messages.
        example: What an example batch says at the source.
        scale: How its values become numbers.
        event_shape: Shape of one event.

    Attributes:
        event_shape: Shape of one input: an image of at least 4 x 4 pixels stays one, everything else is flat.
        given_shape: Shape of one event as the model has it, classes last.
        has_mask: Whether entries may be missing.

    Raises:
        ModelError: If an event has more than three dimensions.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, example: Observation, scale: Scale, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(event_shape) > _MOST_EVENT_DIMS:
            raise ModelError(
                f"There is no encoder for events of shape {list(event_shape)}, as {name!r} has them: expected at most "
                f"{_MOST_EVENT_DIMS} dimensions. Give one: encoder=module, called with [rows, *event], returning [rows, features].",
                site=name,
            )
        self.event_dim = len(event_shape)
        self.scale = scale
        self.has_mask = example.mask is not None
        self.name = name
        width = scale.num_classes + scale.has_number
        self.given_shape = (*event_shape, width) if width else event_shape
        is_image = len(event_shape) == 3 and not scale.num_classes and min(event_shape[1:]) >= _SMALLEST_IMAGE
        self.event_shape = event_shape if is_image else (math.prod(self.given_shape),)
        mean, deviation = self._moments(self._numbers(example))
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    @property
    def is_image(self) -> bool:
        """Whether one input is ``[channels, height, width]``."""
        return len(self.event_shape) == 3

    def forward(self, observation: Observation) -> Observation:
        """Standardise: inputs and their mask, ``[rows, inner plates, *event_shape]``; missing entries are 0."""
        if observation.mask is not None and not self.has_mask:
            raise DataError(
                f"Entries of {self.name!r} are masked or NaN in this batch, and none were in the batch that the guide was built "
                f"on. Build it on a batch that has missing entries: guide.build(*batch).",
                site=self.name,
            )
        value, mask = self._numbers(observation)
        value = ((value - self.mean) / self.deviation).clamp(-_LARGEST, _LARGEST)
        if mask is not None:
            value = torch.where(mask, value, 0.0)
        elif self.has_mask:
            mask = torch.ones_like(value, dtype=torch.bool)
        return Observation(value, mask)

    def _numbers(self, observation: Observation) -> Observation:
        """Turn values into numbers ``[..., *event_shape]``, missing ones into 0."""
        value, mask = observation
        shape = (*value.shape[: value.dim() - self.event_dim], *self.event_shape)
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        if mask is not None:
            value = torch.where(mask, value, torch.zeros_like(value))
        if self.scale.num_classes:
            classes = torch.arange(self.scale.num_classes, device=value.device)
            number = value[..., None].to(dtype)
            value = (value[..., None] == classes).to(dtype)  # a class that the example lacks is all zeros
            value = torch.cat([value, number], -1) if self.scale.has_number else value
            mask = None if mask is None else mask[..., None].expand(value.shape)
        value = value.to(dtype)
        if self.scale.is_count:
            value = value.clamp(min=0.0).log1p()
        if self.scale.is_positive:
            value = torch.where(value > 0, value, torch.ones_like(value)).log()
        return Observation(value.reshape(shape), None if mask is None else mask.reshape(shape))

    def _moments(self, numbers: Observation) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each input over rows and inner plates."""
        value = numbers.value.reshape(-1, *self.event_shape)
        known = torch.ones_like(value) if numbers.mask is None else numbers.mask.reshape(value.shape).to(value)
        count = known.sum(0).clamp(min=1.0)
        mean = (value * known).sum(0) / count
        deviation = ((value - mean).square() * known).sum(0).div(count).sqrt()
        if self.scale.is_bounded or self.scale.num_classes:
            return mean, deviation.clamp(min=0.25)
        is_constant = deviation <= 1e-6 * (1 + mean.abs())
        return mean, torch.where(is_constant, torch.ones_like(deviation), deviation)
