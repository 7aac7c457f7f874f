"""Steps of training as ``fit`` takes them on data in memory, one by one."""

from typing import Any

from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.training.epochs import CHECK_EVERY
from pyro_aevb.training.staged import Staging
from pyro_aevb.training.stepper import Stepper, default_optimizer

__all__ = ["stepper_of_fit"]


def stepper_of_fit(module: ObjectiveModule, *, compile: bool = False, fabric: Any = None) -> Stepper:  # noqa: A002
    """Return what takes the steps of ``fit``: supports were checked before, recordings are compared again every 10,000 steps."""
    stepper = Stepper(module, default_optimizer(1e-3), fabric=fabric, staging=Staging(compile=compile))
    stepper.check_every, stepper.checks_supports = CHECK_EVERY, False
    return stepper
