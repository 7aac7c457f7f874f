"""The paper's variational autoencoder in PyTorch alone, written by hand (arXiv 1312.6114, App. B and C)."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam, Optimizer

__all__ = ["HandWrittenVAE", "step", "train"]


class HandWrittenVAE(nn.Module):
    """One hidden layer of tanh units on either side; the parameters' names are those of the Pyro program's.

    Args:
        pixels: Pixels of an image.
        hidden: Hidden units of encoder and decoder.
        latent: Latents.
    """

    def __init__(self, pixels: int = 784, hidden: int = 500, latent: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def bound(self, x: Tensor) -> Tensor:
        """Estimate the bound of each row from one draw, the KL in closed form (Eq 10, App. B)."""
        loc, log_variance = self.encoder(x).chunk(2, -1)
        scale = (log_variance / 2).exp()
        z = loc + scale * torch.randn_like(loc)
        negative_kl = (1 + log_variance - loc.square() - scale.square()).sum(-1) / 2
        return self.log_likelihood(x, z) + negative_kl

    def importance_weighted_bound(self, x: Tensor, num_samples: int) -> Tensor:
        """Estimate log mean p(x, z) / q(z | x) of each row (arXiv 1509.00519, Eq 8)."""
        loc, log_variance = self.encoder(x).chunk(2, -1)
        noise = torch.randn(num_samples, *loc.shape)
        z = loc + (log_variance / 2).exp() * noise
        # the normals' constants cancel between prior and guide
        log_prior_over_guide = (noise.square() + log_variance - z.square()).sum(-1) / 2
        log_weights = self.log_likelihood(x, z) + log_prior_over_guide
        return log_weights.logsumexp(0) - math.log(num_samples)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Sum the Bernoulli log likelihood of the pixels."""
        logits = self.decoder(z)
        return -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def step(vae: HandWrittenVAE, optimizer: Optimizer, x: Tensor) -> float:
    """Take one optimisation step and return the mean bound of the batch."""
    optimizer.zero_grad()
    loss = -vae.bound(x).mean()
    loss.backward()
    optimizer.step()
    return -loss.item()


def train(vae: HandWrittenVAE, x: Tensor, *, num_epochs: int, batch_size: int, learning_rate: float) -> None:
    """Train with fused Adam on shuffled batches."""
    optimizer = Adam(vae.parameters(), lr=learning_rate, fused=True)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            step(vae, optimizer, x[rows])
