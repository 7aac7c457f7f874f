"""The networks of a guide: encoders of observations and the heads that turn features into a family's parameters.

Tensors are in canonical layout, ``[*lead, rows, inner plates, features]``; see :mod:`pyro_aevb.guides.layout`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_aevb.errors import DataError, GuideError
from pyro_aevb.guides.encoders import ConvEncoder, MLPEncoder, SequenceEncoder, SetEncoder
from pyro_aevb.guides.inputs import Input, Observation
from pyro_aevb.guides.plan import Direction

__all__ = ["CustomEncoder", "Encoder", "Head", "Mark", "Pooling", "SeriesEncoder", "concatenate"]

_NUM_FEATURES = 64
_NUM_MARKS = 16


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors along the last axis, the others broadcast."""
    shape = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
    return torch.cat([tensor.expand(*shape, tensor.shape[-1]) for tensor in tensors], -1)


class _Items(nn.Module):
    """Turns the inputs of one instance of the plates into one vector: images by convolutions, everything else as it is."""

    def __init__(self, inputs: Sequence[Input], num_sampled: int) -> None:
        super().__init__()
        self.images = nn.ModuleDict()
        self.num_features = num_sampled
        for index, item in enumerate(inputs):
            if item.is_image:
                channels, height, width = item.event_shape
                self.images[str(index)] = ConvEncoder(
                    (channels * (2 if item.has_mask else 1), height, width), _NUM_FEATURES
                )
                self.num_features += _NUM_FEATURES
            else:
                self.num_features += item.event_shape[0] * (2 if item.has_mask else 1)
        self.is_image = [item.is_image for item in inputs]

    @property
    def has_vectors(self) -> bool:
        """Whether anything is no image."""
        return self.num_features > _NUM_FEATURES * len(self.images)

    def forward(self, observations: Sequence[Observation], sampled: Sequence[Tensor] = ()) -> Tensor:
        """Return ``[*lead, rows, inner plates, num_features]``, images first."""
        images = [
            self.images[str(index)](self._channels(item))
            for index, item in enumerate(observations)
            if self.is_image[index]
        ]
        vectors = [_vector(item) for index, item in enumerate(observations) if not self.is_image[index]]
        return concatenate([*images, *vectors, *sampled])

    @staticmethod
    def _channels(observation: Observation) -> Tensor:
        value, mask = observation
        return value if mask is None else torch.cat([value, mask.to(value)], -3)


def _vector(observation: Observation) -> Tensor:
    value, mask = observation
    return value if mask is None else torch.cat([value, mask.to(value)], -1)


@dataclass(frozen=True)
class Pooling:
    """How plates are read that a latent does not lie in, by canonical axes counted from the rows'.

    Attributes:
        vector: Axes and sizes of plates whose indices are not alike: all indices are one vector.
        items: Axes of plates whose indices are alike: a set, or a sequence.
        order: ``None`` for a set; along one plate in order, ``"step"`` for features at each index, ``"summary"`` of all of them.
    """

    vector: Mapping[int, int]
    items: tuple[int, ...]
    order: Literal["step", "summary"] | None


class Encoder(nn.Module):
    """Reads the sources of one group: those of one instance as a vector, many as a longer vector, a set or in order.

    Args:
        inputs: Inputs of the observed sources.
        num_sampled: Number of inputs of sampled latents that are pooled with them.
        pooling: How plates are read.
    """

    def __init__(self, inputs: Sequence[Input], num_sampled: int, pooling: Pooling) -> None:
        super().__init__()
        self.items = _Items(inputs, num_sampled)
        self.pooling = pooling
        self.num_features = _NUM_FEATURES
        self.reader: nn.Module
        size = self.items.num_features * math.prod(pooling.vector.values())
        if pooling.order is not None:
            self.reader = SequenceEncoder(size, _NUM_FEATURES, direction="both")
        elif pooling.items:
            self.reader = SetEncoder(size, _NUM_FEATURES)
        elif self.items.has_vectors or pooling.vector:
            self.reader = MLPEncoder(size, _NUM_FEATURES)
        else:
            self.reader, self.num_features = nn.Identity(), size

    @property
    def label(self) -> str:
        """Name of the network, for tables."""
        names = [type(image).__name__ for image in self.items.images.values()]
        return " + ".join(names if isinstance(self.reader, nn.Identity) else [*names, type(self.reader).__name__])

    def forward(self, observations: Sequence[Observation], sampled: Sequence[Tensor], num_axes: int) -> Tensor:
        """Return features ``[*lead, rows, inner plates, features]``, pooled plates of size 1."""
        items = self.items(observations, sampled)
        first = items.dim() - 1 - num_axes
        mask = _present(observations, num_axes)
        mask = None if mask is None else mask.expand(items.shape[:-1])
        for axis, size in self.pooling.vector.items():
            items, mask = _as_vector(items, mask, first + axis, size)
        if not self.pooling.items:
            return self.reader(items)
        return self._pool(items, mask, [first + axis for axis in self.pooling.items])

    def _pool(self, items: Tensor, mask: Tensor | None, axes: list[int]) -> Tensor:
        """Move the plates' axes to the end, read them as one axis of items, and put the plates back."""
        kept = [axis for axis in range(items.dim() - 1) if axis not in axes]
        moved = items.permute(*kept, *axes, items.dim() - 1).flatten(len(kept), -2)
        moved_mask = None if mask is None else mask.permute(*kept, *axes).flatten(len(kept))
        if self.pooling.order == "step":
            return self.reader(moved, moved_mask).movedim(-2, axes[0])
        read = self.reader.summary if isinstance(self.reader, SequenceEncoder) else self.reader
        features = read(moved, moved_mask)
        for axis in axes:
            features = features.unsqueeze(axis)
        return features


def _as_vector(items: Tensor, mask: Tensor | None, axis: int, size: int) -> tuple[Tensor, Tensor | None]:
    """Join the items along an axis to one vector, which is there if any item is."""
    if items.shape[axis] not in (1, size):
        raise DataError(
            f"A plate of {size} indices that the model does not treat alike has {items.shape[axis]} in this batch. Keep its size, "
            f"and mask what is missing."
        )
    items = items.expand(*items.shape[:axis], size, *items.shape[axis + 1 :])
    vector = items.movedim(axis, -2).flatten(-2).unsqueeze(axis)
    return vector, None if mask is None else mask.any(axis, keepdim=True)


class Mark(nn.Module):
    """Tells a head which index of a plate, or which step of a series, it is at: a learned vector for each.

    Args:
        size: Number of indices.
        axis: The plate's canonical axis, counted from the rows'; ``None`` for the steps of a series.
    """

    def __init__(self, size: int, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.num_features = min(size, _NUM_MARKS)
        self.vectors = nn.Parameter(torch.randn(size, self.num_features))

    def forward(self, step: int, num_axes: int) -> Tensor:
        """Return ``[rows, inner plates, num_features]``, of size 1 but along the plate."""
        if self.axis is None:
            return self.vectors[step].reshape(*(1,) * num_axes, -1)
        shape = [1] * num_axes
        shape[self.axis] = -1
        return self.vectors.reshape(*shape, self.num_features)


def _present(observations: Sequence[Observation], num_axes: int) -> Tensor | None:
    """Return which items, ``[rows, ...]`` over the first axes, hold any observation; ``None`` where all do."""
    if not observations or any(mask is None for _, mask in observations):
        return None
    masks = [mask.flatten(num_axes).any(-1) for _, mask in observations if mask is not None]
    shape = torch.broadcast_shapes(*(mask.shape for mask in masks))
    return torch.stack([mask.expand(shape) for mask in masks]).any(0)


class SeriesEncoder(nn.Module):
    """Reads observations of a loop in order: features of each time.

    Args:
        inputs: Inputs of each kind of observation.
        direction: As in :class:`~pyro_aevb.guides.encoders.SequenceEncoder`.
    """

    def __init__(self, inputs: Sequence[Input], direction: Direction) -> None:
        super().__init__()
        self.items = _Items(inputs, num_sampled=0)
        self.reader = SequenceEncoder(self.items.num_features, _NUM_FEATURES, direction=direction)
        self.num_features = _NUM_FEATURES

    label = "SequenceEncoder"

    def forward(self, observations: Sequence[Observation]) -> Tensor:
        """Return ``[rows, inner plates, times, features]`` of observations ``[rows, inner plates, times, *event]``."""
        items = self.items(observations)
        mask = _present(observations, items.dim() - 1)
        return self.reader(items, None if mask is None else mask.expand(items.shape[:-1]))


class CustomEncoder(nn.Module):
    """Calls a user's module, and says clearly what it was given and should have returned.

    Args:
        module: Called with ``[rows, plates of the source, *event]``, or with a dictionary of them by source; a scalar event that
            lies in no inner plate is ``[rows, 1]``. In a series times follow the plates.
        shapes: Event shape of each source.
        plates: Canonical axes of the inner plates that the latent lies in.
        is_series: Whether features are wanted at each time.

    Attributes:
        num_features: Length of what it returns, masks included; known after a first call.
    """

    def __init__(
        self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], plates: Sequence[int], *, is_series: bool
    ) -> None:
        super().__init__()
        self.module = module
        self.shapes = dict(shapes)
        self.plates = list(plates)
        self.is_series = is_series
        self.num_features = 0

    @property
    def label(self) -> str:
        """Name of the network, for tables."""
        return type(self.module).__name__

    def forward(self, observations: Sequence[Observation], num_axes: int) -> Tensor:
        """Return ``[rows, inner plates, (times,) features]``; masks are joined to the features."""
        axes = num_axes + self.is_series
        pairs = zip(self.shapes.items(), observations, strict=True)
        values = {name: value.reshape(_squeezed(value, axes, shape)) for (name, shape), (value, _) in pairs}
        features = self._call(values)
        sizes = [max(item.value.shape[axis] for item in observations) for axis in self.plates]
        times = list(observations[0].value.shape[num_axes:axes])
        expected = [len(observations[0].value), *sizes, *times]
        if not isinstance(features, Tensor) or list(features.shape[:-1]) != expected:
            self._refuse(values, expected, list(features.shape) if isinstance(features, Tensor) else type(features))
        shape = [len(observations[0].value)] + [1] * (num_axes - 1)
        for axis, size in zip(self.plates, sizes, strict=True):
            shape[axis] = size
        features = features.reshape(*shape, *times, -1)
        masks = [self._mask(mask, num_axes).to(features) for _, mask in observations if mask is not None]
        return concatenate([features, *masks])

    def _call(self, values: dict[str, Tensor]) -> Any:
        try:
            return self.module(next(iter(values.values())) if len(values) == 1 else values)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
            raise GuideError(
                f"The encoder {type(self.module).__name__} failed on {_described(values)}: {error}. It is called with these shapes."
            ) from error

    def _refuse(self, values: dict[str, Tensor], expected: list[int], got: object) -> None:
        raise GuideError(
            f"The encoder {type(self.module).__name__} must return {[*expected, 'features']} of {_described(values)}, got {got}: "
            f"one row of features for each row, and for each index of the inner plates that the latent lies in."
        )

    def _mask(self, mask: Tensor, num_axes: int) -> Tensor:
        """Flatten a mask to one vector for each index that the latent has."""
        if self.is_series:
            return mask.flatten(num_axes + 1)
        pooled = [axis for axis in range(1, num_axes) if axis not in self.plates]
        moved = mask.flatten(num_axes).movedim(pooled, list(range(-1 - len(pooled), -1))).flatten(-1 - len(pooled))
        for axis in pooled:
            moved = moved.unsqueeze(axis)
        return moved


def _described(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}: {list(value.shape)}" for name, value in values.items())


def _squeezed(value: Tensor, num_axes: int, shape: tuple[int, ...]) -> list[int]:
    """Return a shape without the axes of plates that a value does not lie in, the event as the model has it."""
    plates = [size for size in value.shape[1:num_axes] if size > 1]
    return [len(value), *plates, *(shape if shape or plates else (1,))]


class Head(nn.Module):
    """Turns features and the values of sampled parents into a family's outputs, all of which start at 0.

    Args:
        num_features: Length of the features.
        num_outputs: Number of outputs.
        is_linear: Whether the outputs are a linear map of the features, for features of one encoder alone.
    """

    def __init__(self, num_features: int, num_outputs: int, *, is_linear: bool) -> None:
        super().__init__()
        self.body: nn.Module = nn.Identity() if is_linear else MLPEncoder(num_features, _NUM_FEATURES)
        self.out = nn.Linear(num_features if is_linear else _NUM_FEATURES, num_outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return outputs ``[..., num_outputs]`` of ``[..., num_features]``."""
        return self.out(self.body(features))
