"""Class 5: time series, in a loop and vectorised, ragged, not normal."""

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, Moments, draw
from model_classes.oracles import gaussian, nuts
from pyro import poutine
from torch import Tensor

from pyro_aevb.testing import LinearGaussianStateSpace

STEPS, VOLATILE_STEPS = 8, 6


def markov_loop(x: Tensor) -> None:
    """The state-space model of :class:`LinearGaussianStateSpace`, under ``pyro.markov``."""
    prior = dist.Normal(0.0, 1.0)
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t + 1}", prior)
            pyro.sample(f"x_{t + 1}", dist.Normal(z, 0.3), obs=x[:, t])
            prior = dist.Normal(0.9 * z, 0.5)


def markov_loop_posterior(model, args, kwargs):
    """Smooth by :class:`LinearGaussianStateSpace`."""
    posterior = LinearGaussianStateSpace().posterior(args[0].double())
    return {name: Moments(fn.mean, fn.stddev.expand_as(fn.mean)) for name, fn in posterior.items()}


def innovations(x: Tensor) -> None:
    """A random walk by the sum of its steps, in a plate over time."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", x.shape[1], dim=-1):
        step = pyro.sample("step", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.7 * step.cumsum(-1), 0.5), obs=x)


def ragged_series(x: Tensor, lengths: Tensor) -> None:
    """A loop in which states and observations beyond a row's length are masked, both."""
    prior = dist.Normal(0.0, 1.0)
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t + 1}", prior)
                pyro.sample(f"x_{t + 1}", dist.Normal(z, 0.4), obs=x[:, t])
            prior = dist.Normal(0.9 * z, 0.5)


def ragged_series_data(rows: int) -> Batch:
    """Give the series lengths from 8 down to 2 in turn."""
    lengths = STEPS - torch.arange(rows) % 7
    values = draw(ragged_series, torch.zeros(rows, STEPS), lengths)
    x = torch.stack([values[f"x_{t + 1}"] for t in range(STEPS)], -1)
    return (x * (torch.arange(STEPS) < lengths[:, None]), lengths), {}


def volatility(x: Tensor) -> None:
    """The log variance of a return follows an autoregression."""
    prior = dist.Normal(0.0, 1.0)
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            h = pyro.sample(f"h_{t + 1}", prior)
            pyro.sample(f"x_{t + 1}", dist.Normal(0.0, (h / 2).exp()), obs=x[:, t])
            prior = dist.Normal(0.9 * h, 0.6)


def volatility_by_grid(x: Tensor) -> dict[str, Moments]:
    """Smooth on a grid of log variances, forward and backward (Kitagawa 1987)."""
    x = x.double()
    h = torch.linspace(-9, 9, 901, dtype=torch.float64)
    step = dist.Normal(0.9 * h[:, None], 0.6).log_prob(h).exp() * (h[1] - h[0])
    likelihood = dist.Normal(0.0, (h / 2).exp()).log_prob(x[..., None]).exp()
    forward, backward = (
        [dist.Normal(0.0, 1.0).log_prob(h).exp() * likelihood[:, 0]],
        [torch.ones(len(x), len(h)).double()],
    )
    for t in range(1, x.shape[1]):
        forward.append(forward[-1] @ step * likelihood[:, t])
        backward.append((backward[-1] * likelihood[:, -t]) @ step.t())
    moments = {}
    for t, (past, future) in enumerate(zip(forward, reversed(backward), strict=True)):
        weights = past * future / (past * future).sum(-1, keepdim=True)
        mean = weights @ h
        moments[f"h_{t + 1}"] = Moments(mean, (weights @ h**2 - mean**2).sqrt())
    return moments


def _stacked(model, steps: int):
    def data(rows: int) -> Batch:
        values = draw(model, torch.zeros(rows, steps))
        return (torch.stack([values[f"x_{t + 1}"] for t in range(steps)], -1),), {}

    return data


def _innovations_data(rows: int) -> Batch:
    return (draw(innovations, torch.zeros(rows, STEPS))["x"],), {}


def _within(step: int):
    return lambda x, lengths: step <= lengths


SERIES = [
    ModelClass("markov_loop", 5, markov_loop, _stacked(markov_loop, STEPS), markov_loop_posterior, "exact"),
    ModelClass(
        "innovations",
        5,
        innovations,
        _innovations_data,
        gaussian,
        "exact",
        max_sd_error=0.7,
        notes="Given the data the steps of one plate depend on each other; a guide draws them at once, independent given what they "
        "read, with the best standard deviations that such a family has.",
    ),
    ModelClass(
        "ragged_series",
        5,
        ragged_series,
        ragged_series_data,
        gaussian,
        "exact",
        num_test_rows=7,
        compared={f"z_{t}": _within(t) for t in range(1, STEPS + 1)},
    ),
    ModelClass("volatility", 5, volatility, _stacked(volatility, VOLATILE_STEPS), nuts, "nuts"),
]
