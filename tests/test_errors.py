"""Warnings point at the user's line, and exceptions keep what they know."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_aevb import AEVB, log_marginal
from pyro_aevb.errors import AEVBError, NonFiniteError, SettingError, UnreliableWarning


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def narrow_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.02))


@pytest.mark.parametrize(
    "weigh", [log_marginal, lambda *args, **settings: AEVB(*args[:2]).log_marginal(args[2], **settings)]
)
def test_a_warning_points_at_the_line_outside_the_package(weigh):
    with pytest.warns(UnreliableWarning) as record:
        weigh(model, narrow_guide, torch.randn(5), seed=0, progress=False)
    assert [warning.filename for warning in record] == [__file__]


def test_exceptions_carry_their_site_and_are_the_builtin_ones_too():
    error = NonFiniteError("text", site="z", num_skipped=3)
    assert (error.site, error.num_skipped, str(error)) == ("z", 3, "text")
    assert isinstance(error, AEVBError)
    assert isinstance(error, ArithmeticError)
    assert issubclass(SettingError, ValueError)
