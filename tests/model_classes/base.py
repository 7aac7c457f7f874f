"""What an entry of the registry is: a model, data simulated from it, and the posterior moments of a few test rows."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

DATA = Path(__file__).resolve().parents[1] / "data"

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""


class Moments(NamedTuple):
    """Posterior mean and standard deviation of a site, elementwise, in the shape that the model gives the site.

    That is the model's own plate layout, with axes of size 1 where a plate to the right is not the site's own: what
    ``guide(*args)[site]`` has. Where the site has ``features``, the moments are theirs.
    """

    mean: Tensor
    sd: Tensor


@dataclass(frozen=True)
class ModelClass:
    """One model that an automatic guide must serve.

    Attributes:
        name: Its name, and that of its file in tests/data.
        number: The class that it belongs to, 1 to 9; ``CLASSES`` in the registry names them.
        model: The Pyro model, its parameters fixed.
        data: Draws a batch of that many rows from the model; it consumes the global random state.
        oracle: Computes the posterior moments of a batch, as ``oracle(model, args, kwargs)``.
        method: How: "exact", "quadrature" or "nuts".
        data_plate: Name of the plate of rows; ``None`` where there are none.
        joint: Whether rows share sampled globals. Then the reference is of all of ``batch()``, and the test rows are its first.
        num_rows: Rows of ``batch()``.
        num_test_rows: Rows of ``test_batch()``.
        features: Per site, what of its value has moments worth comparing (cosine and sine of an angle).
        compared: Per site, from a batch to the elements that have a posterior; others are masked out of the model.
        max_mean_error: How far, in posterior standard deviations, a factorised normal guide's mean may lie off by its family.
        max_sd_error: How far, as a logarithm, its standard deviations may lie off after a long training.
        notes: What is special.
    """

    name: str
    number: int
    model: Callable[..., None]
    data: Callable[[int], Batch]
    oracle: Callable[..., dict[str, Moments]]
    method: str = "quadrature"
    data_plate: str | None = "data"
    joint: bool = False
    num_rows: int = 400
    num_test_rows: int = 6
    features: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    compared: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    max_mean_error: float = 0.25
    max_sd_error: float = 0.3
    notes: str = ""

    def batch(self) -> Batch:
        """Return data to train on, the same at each call."""
        if self.joint:
            return read_batch(self.stored()["batch"])
        return self.simulate(self.num_rows, seed=self.number)

    def test_batch(self) -> Batch:
        """Return the rows that the reference describes."""
        if self.joint:
            return first_rows(self.batch(), self.num_rows, self.num_test_rows)
        return read_batch(self.stored()["batch"])

    @property
    def reference(self) -> dict[str, Moments]:
        """Posterior moments by site: of test rows for sites in the data plate, whole for globals."""
        sites = self.stored()["sites"]
        return {site: Moments(torch.tensor(item["mean"]), torch.tensor(item["sd"])) for site, item in sites.items()}

    def feature(self, site: str, value: Tensor) -> Tensor:
        """Return what of a site's value the reference describes; any leading axes of draws are kept."""
        return self.features.get(site, lambda same: same)(value)

    def is_compared(self, site: str) -> Tensor:
        """Return which elements of the site's reference a guide can be held to, a mask of its shape."""
        mean = self.reference[site].mean
        if site not in self.compared:
            return torch.ones_like(mean, dtype=torch.bool)
        args, kwargs = self.test_batch()
        return self.compared[site](*args, **kwargs).expand_as(mean)

    def simulate(self, rows: int, *, seed: int) -> Batch:
        """Draw a batch from the model, the global random state left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.data(rows)

    def stored(self) -> dict[str, Any]:
        """Return what the entry's file holds."""
        return _read(self.name)


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def write_batch(batch: Batch) -> dict[str, Any]:
    """Return a batch as JSON holds it, numbers to 5 digits."""

    def write(tensor: Tensor) -> dict[str, Any]:
        numbers = torch.tensor([float(f"{v:.5g}") for v in tensor.flatten().tolist()], dtype=torch.float64)
        values = (
            numbers.to(tensor.dtype).reshape(tensor.shape).tolist() if tensor.is_floating_point() else tensor.tolist()
        )
        return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": _shorten(values)}

    args, kwargs = batch
    return {"args": [write(item) for item in args], "kwargs": {name: write(item) for name, item in kwargs.items()}}


def _shorten(values: Any) -> Any:
    if isinstance(values, list):
        return [_shorten(item) for item in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values


def read_batch(stored: dict[str, Any]) -> Batch:
    """Undo :func:`write_batch`."""

    def read(item: dict[str, Any]) -> Tensor:
        return torch.tensor(item["values"], dtype=getattr(torch, item["dtype"]))

    return tuple(read(item) for item in stored["args"]), {name: read(item) for name, item in stored["kwargs"].items()}


def first_rows(batch: Batch, rows: int, count: int) -> Batch:
    """Return the first rows of every tensor that has as many rows as the batch."""

    def cut(item: Any) -> Any:
        return item[:count] if isinstance(item, Tensor) and item.dim() and len(item) == rows else item

    args, kwargs = batch
    return tuple(cut(item) for item in args), {name: cut(item) for name, item in kwargs.items()}


def draw(model: Callable[..., None], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Run a model with its observations sampled and return the value of every site."""
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    return {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}


def fixed_net(inputs: int, outputs: int, phase: float = 0.0, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Return a mildly nonlinear map of the last axis, its weights sines, in the dtype of what it is given."""
    i, j = torch.arange(1.0, inputs + 1)[:, None], torch.arange(1.0, outputs + 1)
    linear = scale * torch.sin(2 * i + j + phase)
    curved = scale * torch.cos(i + 3 * j + phase)
    bias = scale / 2 * torch.cos(j + phase)

    def net(z: Tensor) -> Tensor:
        return z @ linear.to(z) + (z @ curved.to(z)).tanh() / 2 + bias.to(z)

    return net


def standard_normal(size: int) -> Any:
    """Return the prior of a vector."""
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)
