r"""Models whose posterior and evidence are known exactly: oracles for whatever infers or estimates.

Each model is a small frozen object: its ``model`` and ``guide`` methods are Pyro programs for a batch, with the data
plate ``"data"``, and its guide *is* the posterior, so that :math:`\log p(x, z) - \log q(z | x) = \log p(x)` for
**every** z. Numbers are in nats. Methods compute in the dtype and on the device of the ``x`` they are given; what makes
its own tensors takes a ``dtype``, float64 by default, because an oracle should be exact.
"""

from pyro_aevb.testing.base import ExactModel
from pyro_aevb.testing.counts import BetaBinomial, GammaPoisson
from pyro_aevb.testing.hierarchical import HierarchicalNormal
from pyro_aevb.testing.normal import LinearGaussian, LinearGaussianMeanField, NormalNormal
from pyro_aevb.testing.schools import EightSchools, Moments
from pyro_aevb.testing.state_space import LinearGaussianStateSpace

__all__ = [
    "BetaBinomial",
    "EightSchools",
    "ExactModel",
    "GammaPoisson",
    "HierarchicalNormal",
    "LinearGaussian",
    "LinearGaussianMeanField",
    "LinearGaussianStateSpace",
    "Moments",
    "NormalNormal",
]
