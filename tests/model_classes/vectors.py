"""Class 1: one vector latent per row, whatever the likelihood; class 9: the same under images."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from model_classes.base import Batch, ModelClass, draw, fixed_net, standard_normal
from model_classes.oracles import quadrature
from torch import Tensor, nn
from torch.nn import functional

Likelihood = Callable[[Tensor], Any]

WIDTH = 6

LIKELIHOODS: dict[str, tuple[int, Likelihood]] = {
    "bernoulli": (WIDTH, lambda eta: dist.Bernoulli(logits=2 * eta)),
    "normal": (WIDTH, lambda eta: dist.Normal(eta, 0.7)),
    "poisson": (WIDTH, lambda eta: dist.Poisson((0.5 * eta + 1).exp())),
    "negative_binomial": (WIDTH, lambda eta: dist.NegativeBinomial(torch.tensor(4.0).to(eta), logits=0.5 * eta)),
    "student_t": (WIDTH, lambda eta: dist.StudentT(torch.tensor(4.0).to(eta), eta, 0.5)),
    "categorical": (4 * WIDTH, lambda eta: dist.Categorical(logits=2 * eta.unflatten(-1, (WIDTH, 4)))),
    "zero_inflated_poisson": (
        WIDTH,
        lambda eta: dist.ZeroInflatedPoisson((0.5 * eta + 1).exp(), gate=torch.tensor(0.3).to(eta)),
    ),
}
"""From the name to the outputs that the decoder gives it, and the distribution of an element of x."""


def vector_class(name: str) -> ModelClass:
    outputs, likelihood = LIKELIHOODS[name]
    decoder = fixed_net(2, outputs)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(2))
            pyro.sample("x", likelihood(decoder(z)).to_event(1), obs=x)

    def data(rows: int) -> Batch:
        empty = torch.zeros(rows, WIDTH, dtype=torch.int64 if name == "categorical" else torch.float32)
        return (draw(model, empty)["x"].to(empty.dtype),), {}

    return ModelClass(f"vector_{name}", 1, model, data, quadrature)


class ConvolutionalDecoder(nn.Module):
    """Two latents to the logits of an image of 8 by 8, its weights fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = fixed_net(2, 2 * 4 * 4, phase=1.0)
        angles = torch.arange(2.0 * 4 * 4).reshape(2, 1, 4, 4)
        self.register_buffer("kernel", torch.sin(0.7 * angles) / 2)

    def forward(self, z: Tensor) -> Tensor:
        maps = self.weights(z).unflatten(-1, (2, 4, 4)).flatten(0, -4)  # a convolution takes one axis of rows
        images = functional.conv_transpose2d(maps, self.kernel.to(z), stride=2, padding=1)
        return images.unflatten(0, z.shape[:-1])


def image_class(name: str, likelihood: Likelihood) -> ModelClass:
    """Return images of one channel."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(2))
            pyro.sample("x", likelihood(z).to_event(3), obs=x)

    def data(rows: int) -> Batch:
        return (draw(model, torch.zeros(rows, 1, 8, 8))["x"],), {}

    return ModelClass(f"images_{name}", 9, model, data, quadrature, num_test_rows=4)


_convolution, _linear = ConvolutionalDecoder(), fixed_net(2, 64, phase=0.5)

VECTORS = [vector_class(name) for name in LIKELIHOODS]
IMAGES = [
    image_class("convolutional", lambda z: dist.Bernoulli(logits=_convolution(z))),
    image_class("linear", lambda z: dist.Normal(_linear(z).unflatten(-1, (1, 8, 8)), 2.0)),
]
