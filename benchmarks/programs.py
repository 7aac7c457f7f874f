"""Models and guides in Pyro, as users write them: the paper's autoencoder (arXiv 1312.6114, section 3, App. C), a hierarchy."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["NUM_GROUPS", "VAE", "Groups"]

NUM_GROUPS = 10_000


class VAE(nn.Module):
    """One hidden layer of tanh units on either side; Bernoulli pixels, which may be grey.

    Args:
        pixels: Pixels of an image.
        hidden: Hidden units of encoder and decoder, 500 in the paper.
        latent: Latents.
    """

    def __init__(self, pixels: int = 784, hidden: int = 500, latent: int = 20) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def model(self, x: Tensor) -> None:
        """Generate images ``x``."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1))
            # grey levels lie outside the support of a Bernoulli, not outside its formula
            pixels = dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1)
            pyro.sample("x", pixels, obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample the latents of images ``x``; the encoder returns mean and log variance."""
        pyro.module("encoder", self.encoder)
        loc, log_variance = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (log_variance / 2).exp()).to_event(1))


class Groups(nn.Module):
    """Groups of eight observations around means of their own, whose mean and spread are global; as a user writes it.

    Args:
        size: Observations of a group.
        hidden: Hidden units of the encoder.
    """

    def __init__(self, size: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.size = size
        self.encoder = nn.Sequential(nn.Linear(size + 2, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.locs = nn.Parameter(torch.zeros(2))
        self.log_scales = nn.Parameter(-torch.ones(2))

    def model(self, x: Tensor) -> None:
        """Generate groups ``x``."""
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        tau = pyro.sample("tau", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", NUM_GROUPS, subsample=torch.arange(len(x))):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            noise = dist.Normal(theta[..., None], 1.0).expand([*theta.shape, self.size])
            pyro.sample("x", noise.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample mean and spread of all, then the mean of each of the groups ``x`` given these."""
        mu = pyro.sample("mu", dist.Normal(self.locs[0], self.log_scales[0].exp()))
        tau = pyro.sample("tau", dist.LogNormal(self.locs[1], self.log_scales[1].exp()))
        shared = torch.stack([mu, tau]).expand(len(x), 2)
        loc, log_scale = self.encoder(torch.cat([x, shared], -1)).unbind(-1)
        with pyro.plate("data", NUM_GROUPS, subsample=torch.arange(len(x))):
            pyro.sample("theta", dist.Normal(loc, log_scale.exp()))
