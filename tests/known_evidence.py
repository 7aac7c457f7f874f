"""Models of one row each whose evidence is known, beside those of ``pyro_aevb.testing``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_aevb.program.density import LogDensity


@dataclass(frozen=True)
class Known:
    """A model, one row of data in float64, log p(x) in nats, and the means of latents where they have a closed form."""

    model: Callable[[Tensor], None]
    x: Tensor
    log_evidence: float
    posterior_mean: dict[str, Tensor] = field(default_factory=dict)


def bernoulli_decoder() -> Known:
    """Return a nonlinear decoder from 2 latents to 8 pixels; its evidence is from a grid of 1201^2 points."""
    k = torch.arange(1, 5).double()
    i = torch.arange(1, 9).double()
    first, offset = torch.sin(torch.outer(k, torch.arange(1, 3).double())), 0.5 * k.cos()
    second, bias = 2 * torch.outer(i, k).cos(), 0.3 * i.sin()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = torch.tanh(z @ first.T + offset) @ second.T + bias
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    return Known(model, torch.tensor([[1.0, 0, 1, 1, 0, 0, 1, 0]]).double(), -3.9517734)


def gamma_exponential() -> Known:
    """Return waiting times with a Gamma(a, b) rate: p(x) = b^a Gamma(a + n) / (Gamma(a) (b + sum x)^(a + n))."""
    a, b, x = 2.0, 1.5, torch.tensor([[0.3, 1.1, 0.2, 2.4]]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(a), x.new_tensor(b)))
            pyro.sample("x", dist.Exponential(rate[..., None] * torch.ones(4)).to_event(1), obs=x)

    n = x.shape[1]
    exact = a * math.log(b) - math.lgamma(a) + math.lgamma(a + n) - (a + n) * math.log(b + x.sum().item())
    return Known(model, x, exact, {"rate": (a + n) / (b + x.sum())})


def dirichlet_multinomial() -> Known:
    """Return counts of three kinds with Dirichlet shares: a ratio of Beta functions times the multinomial coefficient."""
    alpha, x = torch.tensor([1.5, 2.0, 3.0]).double(), torch.tensor([[2.0, 5.0, 3.0]]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            shares = pyro.sample("shares", dist.Dirichlet(alpha))
            pyro.sample("x", dist.Multinomial(10, shares), obs=x)

    def log_beta(a: Tensor) -> Tensor:
        return a.lgamma().sum() - a.sum().lgamma()

    coefficient = torch.tensor(11.0).double().lgamma() - (x[0] + 1).lgamma().sum()
    exact = (coefficient + log_beta(alpha + x[0]) - log_beta(alpha)).item()
    return Known(model, x, exact, {"shares": (alpha + x[0]) / (alpha + x[0]).sum()})


@dataclass(frozen=True)
class TwoModes:
    """A normal prior of scale 2 and a likelihood that is a mixture of two normals at +-``place`` on the first axis.

    Both modes are known: 30 % of the likelihood lie above, 70 % below.
    """

    dim: int
    scale: float
    place: float
    rows: int = 1

    @property
    def centre(self) -> Tensor:
        return self.place * torch.eye(self.dim)[0].double()

    @property
    def log_evidence(self) -> float:
        wide = math.sqrt(4 + self.scale**2)
        return torch.distributions.Normal(0.0, wide).log_prob(self.centre).sum().item()

    def log_prior(self, u: Tensor) -> Tensor:
        return torch.distributions.Normal(0.0, 2.0).log_prob(u).sum(-1)

    def log_likelihood(self, u: Tensor) -> Tensor:
        high, low = (torch.distributions.Normal(sign * self.centre, self.scale).log_prob(u).sum(-1) for sign in (1, -1))
        return torch.logaddexp(math.log(0.3) + high, math.log(0.7) + low)

    def density(self) -> LogDensity:
        return LogDensity.from_function(
            self.log_prior,
            self.log_likelihood,
            self.dim,
            rows=self.rows,
            dtype=torch.float64,
            draw_prior=lambda n: 2 * torch.randn(n, self.rows, self.dim).double(),
        )

    def draw_low_mode(self, num_draws: int) -> Tensor:
        """Draw from the posterior of the mode below alone."""
        shrink = 4 / (4 + self.scale**2)
        noise = torch.randn(num_draws, self.rows, self.dim).double()
        return -shrink * self.centre + self.scale * math.sqrt(shrink) * noise
