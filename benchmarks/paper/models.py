"""The paper's autoencoders as Pyro programs (arXiv 1312.6114, section 3, App. C): grey digits and Gaussian faces."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.paper.settings import Curve
from benchmarks.programs import VAE

__all__ = ["LEAST_SCALE", "FaceVAE", "make_vae"]

LEAST_SCALE = 1 / 256
"""Floor of the Gaussian decoder's standard deviation, one grey level: without one its likelihood has no upper bound
(Mattei and Frellsen 2018, arXiv 1802.04826)."""


class FaceVAE(nn.Module):
    """One hidden layer of tanh units on either side; Gaussian pixels with means in (0, 1) (App. C.2).

    Args:
        pixels: Pixels of an image.
        hidden: Hidden units of encoder and decoder, 200 in the paper.
        latent: Latents.
    """

    def __init__(self, pixels: int = 560, hidden: int = 200, latent: int = 2) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, 2 * pixels))

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the pixels, the latter above its floor by a smooth bend."""
        mean, log_variance = self.decoder(z).chunk(2, -1)
        return torch.sigmoid(mean), (LEAST_SCALE**2 + log_variance.exp()).sqrt()

    def model(self, x: Tensor) -> None:
        """Generate images ``x``."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1))
            pyro.sample("x", dist.Normal(*self.decode(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample the latents of images ``x``; the encoder returns mean and log variance."""
        pyro.module("encoder", self.encoder)
        loc, log_variance = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (log_variance / 2).exp()).to_event(1))


def make_vae(curve: Curve, pixels: int) -> VAE | FaceVAE:
    """Make a curve's networks, every parameter drawn from N(0, 0.01) as the curve reads it, under its seed (section 5)."""
    generator = torch.Generator().manual_seed(curve.seed)
    vae = (VAE if curve.is_grey else FaceVAE)(pixels, curve.hidden, curve.latent)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(0.0, curve.initial_sd, generator=generator)
    return vae
