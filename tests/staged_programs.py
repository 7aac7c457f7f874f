"""Programs of each kind and objectives, that are recorded and compiled."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_aevb import (
    IWELBO,
    SGVB,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ReweightedWakeSleep,
    WakeSleep,
)

softplus = nn.functional.softplus


class Autoencoder(nn.Module):
    """Hand-written model and guide in one nn.Module."""

    def __init__(self, *encoder):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
        self.encoder = nn.Sequential(*encoder, nn.Linear(4, 4))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(scale)).to_event(1))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Linear(2, 8), nn.Unflatten(-1, (2, 2, 2)), nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 1, 2, 2)
        )
        self.encoder = nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(scale)).to_event(1))


class Gammas(nn.Module):
    """Latents whose gradients are implicit."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            a, b = softplus(self.encoder(x)).unbind(-1)
            pyro.sample("z", dist.Gamma(a + 1, b + 0.1))


def with_global(x):
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 1.0).to_event(1), obs=x)


class Constrained(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.scale = PyroParam(torch.tensor(0.5), constraints.positive)

    def forward(self, x):
        mean = pyro.sample("mean", dist.Normal(self.loc, self.scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + x.mean(-1) + mean, self.scale))


def with_params(x):
    loc = pyro.param("loc", x.new_zeros(()))
    scale = pyro.param("scale", x.new_tensor(0.5), constraint=constraints.positive)
    mean = pyro.sample("mean", dist.Normal(loc, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + x.mean(-1) + mean, scale))


def methods(module):
    return module.model, module.guide


class Decoder(nn.Module):
    """A model for guides that build themselves."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)


def automatic(kind):
    model = Decoder()
    return model, kind(model)


PROGRAMS = {
    "nn.Module": lambda: methods(Autoencoder()),
    "PyroParam, global": lambda: (with_global, Constrained()),
    "pyro.param, global": lambda: (with_global, with_params),
    "AutoNormal, global": lambda: (with_global, AutoNormal(with_global)),
    "convolution and BatchNorm": lambda: methods(Convolutional()),
    "dropout": lambda: methods(Autoencoder(nn.Dropout(0.5))),
    "Gamma": lambda: methods(Gammas()),
    "AutoAmortizedNormal": lambda: automatic(AutoAmortizedNormal),
    "AutoAmortizedMultivariateNormal": lambda: automatic(AutoAmortizedMultivariateNormal),
    "AutoAmortizedFlow": lambda: automatic(AutoAmortizedFlow),
}
OBJECTIVES = {
    "A": lambda: SGVB(kl="sampled"),
    "B": lambda: SGVB(2),
    "stl": lambda: SGVB(gradient="stl"),
    "score": lambda: SGVB(gradient="score"),
    "importance weighted": lambda: IWELBO(3),
    "dreg": lambda: IWELBO(3, 2, gradient="dreg"),
    "reweighted wake-sleep": lambda: ReweightedWakeSleep(3),
    "wake-sleep": lambda: WakeSleep(),
}
JOINT = {("AutoNormal, global", name) for name in ("importance weighted", "dreg")}
NOISE_AGAIN = {("dropout", name) for name in ("stl", "score", "dreg", "reweighted wake-sleep")}
"""Graphs can't draw the same mask twice, which weighing a draw once more needs: these run eagerly."""

LESS_NOISE = {("dropout", "wake-sleep")}
"""A graph leaves out noise that nothing reads, after which others are drawn: these run eagerly too."""


def batch(name):
    return torch.randn(6, 1, 4, 4) if name == "convolution and BatchNorm" else torch.randn(6, 4)


WITHOUT_GLOBALS = {(name, f"{kind}wake-sleep") for name in PROGRAMS if "global" in name for kind in ("", "reweighted ")}
FLOWS = {("AutoAmortizedFlow", name) for name in OBJECTIVES if name != "A"}
"""Thousands of operations each."""

CASES = [
    pytest.param(p, o, id=f"{p}, {o}", marks=pytest.mark.slow if (p, o) in FLOWS else ())
    for p in PROGRAMS
    for o in OBJECTIVES
    if (p, o) not in JOINT | NOISE_AGAIN | LESS_NOISE | WITHOUT_GLOBALS
]
