"""The paper's variational auto-encoder (Kingma & Welling, arXiv 1312.6114, section 3 and appendix C) as a Pyro program."""

import pyro
import pyro.distributions as dist
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""A Pyro model p(x, z) with one hidden layer of tanh units; its guide q(z | x) is built from it.

    .. math:: z \sim N(0, I), \quad x \sim \mathrm{Bernoulli}(f(z))

    Appendix C.1 gives the decoder f. Grey levels in [0, 1] may stand for x, as in the paper; the density is then that of no
    distribution of grey levels, so ``validate_args`` is off.

    Args:
        pixels: Length of x.
        latent: Length of z.
        hidden: Hidden units of the decoder.
    """

    def __init__(self, pixels: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.latent = latent
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def model(self, x: Tensor) -> None:
        """Draw latents from the prior and pixels from the decoder."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1), obs=x)

    def decode(self, z: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch pixels"]:
        """Return E[x | z]."""
        return self.decoder(z).sigmoid()
