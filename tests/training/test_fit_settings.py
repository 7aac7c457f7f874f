"""Settings of a fit of the wrong kind are refused before anything runs, by a message that shows the right kind."""

import pyro
import pytest
import torch

from pyro_aevb.errors import SettingError
from pyro_aevb.training.fit_settings import check_makers, check_numbers, make_schedule

WEIGHT = torch.nn.Parameter(torch.zeros(1))
ADAM = torch.optim.Adam([WEIGHT])


@pytest.mark.parametrize("optimizer", ["adam", 0.1, ADAM, pyro.optim.Adam({"lr": 0.1})])
def test_optimizers(optimizer):
    with pytest.raises(SettingError, match="takes parameters and returns a torch optimizer"):
        check_makers(optimizer, None, ())


@pytest.mark.parametrize("schedule", ["cosine", torch.optim.lr_scheduler.StepLR(ADAM, 1)])
def test_schedules(schedule):
    with pytest.raises(SettingError, match="takes the optimizer and returns a scheduler"):
        check_makers(None, schedule, ())


def test_what_makes_no_schedule():
    with pytest.raises(SettingError, match="must return a scheduler of torch's, got 'cosine'"):
        make_schedule(lambda optimizer: "cosine", ADAM)


@pytest.mark.parametrize("callbacks", [print, ["a"], 3])
def test_callbacks(callbacks):
    with pytest.raises(SettingError, match="callbacks must be a list of functions"):
        check_makers(None, None, callbacks)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (("fast", None, None, 10), "learning_rate must be a positive number, got 'fast'"),
        ((None, "big", None, 10), "clip_norm must be a positive number, got 'big'"),
        ((None, None, 1.5, 10), "patience must be an integer"),
        ((None, None, None, 1.5), "max_skipped must be an integer"),
    ],
)
def test_numbers(settings, match):
    with pytest.raises(SettingError, match=match):
        check_numbers(*settings)


def test_what_is_right():
    check_makers(torch.optim.SGD, lambda optimizer: None, [print])
    check_numbers(0.1, float("inf"), 3, 0)
