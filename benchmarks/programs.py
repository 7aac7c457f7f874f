"""The paper's variational autoencoder as a Pyro model and guide (arXiv 1312.6114, section 3 and App. C), as a user writes it."""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

__all__ = ["VAE"]


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
