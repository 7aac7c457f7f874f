"""Trained guides against the posterior moments of every entry of the registry."""

import pytest
from model_classes.base import ModelClass
from model_classes.registry import REGISTRY
from model_classes.training import distances, trained

from pyro_aevb import AutoAmortizedMultivariateNormal, AutoAmortizedNormal

QUICK = {"collider": 0.1, "simplex": 0.1, "mixed_table": 0.1, "nested_counts": 0.1}
"""Entries whose posteriors are close to normal, and how far, in posterior sds, means may lie off after 200 steps."""


@pytest.mark.parametrize("name", QUICK)
def test_a_short_training_comes_near(name: str) -> None:
    entry = REGISTRY[name]
    for site, distance in distances(entry, trained(entry, AutoAmortizedNormal, num_steps=200)).items():
        assert distance.mean < QUICK[name], site
        assert distance.log_sd < 0.15, site


@pytest.mark.slow
@pytest.mark.parametrize("entry", REGISTRY.values(), ids=REGISTRY.keys())
def test_a_long_training_reaches_the_posterior(entry: ModelClass) -> None:
    """Averaged over test rows, to what the family misses, the reference's own error and a few hundredths of the optimizer's."""
    guide = trained(entry, AutoAmortizedMultivariateNormal, num_steps=3000)
    for site, distance in distances(entry, guide).items():
        error = entry.stored()["sites"][site].get("mcse", 0.0)
        assert distance.mean < entry.max_mean_error + 5 * error, site
        assert distance.log_sd < entry.max_sd_error + 10 * error, site
