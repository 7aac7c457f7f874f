"""What a fit by Monte Carlo EM needs to be continued from where it stands, and how it gets there again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb.errors import FileError
from pyro_aevb.program.parameters import Program
from pyro_aevb.program.structure import Structure
from pyro_aevb.randomness import RandomState, random_state, restore_random_state
from pyro_aevb.training.checkpoint import Checkpoints, check_setting
from pyro_aevb.training.continuation import (
    callback_states,
    circumstances,
    compare_circumstances,
    fingerprint,
    load_callbacks,
    passing_buffers,
)
from pyro_aevb.training.data import BatchSource
from pyro_aevb.training.files import Contents
from pyro_aevb.training.packing import pack, unpack
from pyro_aevb.training.result import EMResult
from pyro_aevb.training.saving import FIT, explain_difference, load_tensors
from pyro_aevb.training.stepper import load_optimizer

__all__ = ["EMState", "StandingEM", "collect_em", "load_em"]

_KIND = "monte_carlo_em"


@dataclass
class EMState:
    """Where the chains of a fit stand.

    Attributes:
        noise_seed: Seed of the chains' noise, a function of it, the row and the step.
        generator: Draws the order of each epoch.
        order: Its state at the beginning of the present one.
        chains: Each row's latents on unconstrained space.
        log_step: Logarithm of the step size, once there is one.
        told: Of each batch of the present epoch its rows, log p(x, z) a row and acceptance.
        seconds: Time that the present epoch took so far.
    """

    noise_seed: int
    generator: torch.Generator
    order: Tensor
    chains: Float[Tensor, "1 rows latent"]
    log_step: Tensor | None = None
    told: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0


@runtime_checkable
class StandingEM(Protocol):
    """A fit by Monte Carlo EM between two steps.

    Attributes:
        settings: What a step does.
        program: The model's parameters.
        structure: The model's structure.
        optimizer: The optimizer.
        source: The rows.
        state: Where the chains stand.
        result: What has happened.
    """

    settings: Any
    program: Program
    structure: Structure
    optimizer: torch.optim.Optimizer
    source: BatchSource
    state: EMState
    result: EMResult


def collect_em(fit: StandingEM, callbacks: Sequence[Any]) -> Contents:
    """Return all that a fit needs to be continued from here.

    Args:
        fit: The fit.
        callbacks: Those that keep a state are asked for it.
    """
    own = fit.state
    state = {
        "setting": _setting(fit),
        "circumstances": circumstances(),
        "noise_seed": own.noise_seed,
        "order": own.order if own.told else own.generator.get_state(),
        "chains": own.chains,
        "log_step": own.log_step,
        "told": own.told,
        "seconds": own.seconds,
        "random": random_state()._asdict(),
        "optimizer": fit.optimizer.state_dict(),
        "callbacks": callback_states(callbacks),
        "buffers": passing_buffers(fit.program),
        "history": fit.result.history,
        "num_steps": fit.result.num_steps,
        "num_updates": fit.result.num_updates,
    }
    tensors = dict(fit.program.state_dict())
    packed = pack(state, tensors, f"{FIT}state")
    return Contents({_KIND: packed, "fingerprint": fit.structure.fingerprint}, tensors)


def load_em(fit: StandingEM, checkpoints: Checkpoints, callbacks: Sequence[Any]) -> bool:
    """Bring a fit that has not begun to where the latest checkpoint was written; tell whether there is one.

    Raises:
        FileError: If the checkpoint is damaged, or one of another model or of another kind of fit.
        SettingError: If the fit is set up in another way.
    """
    found = checkpoints.read_latest()
    if found is None:
        return False
    path, (header, tensors) = found
    if _KIND not in header:
        raise FileError(f"{path} holds no fit by Monte Carlo EM. Give an empty folder.")
    if difference := explain_difference(fit.structure, header):
        raise FileError(f"{path} belongs to another model: {difference}. Give its model, or an empty folder.")
    state = unpack(header[_KIND], tensors)
    check_setting(path, state["setting"], _setting(fit))
    load_tensors(fit.program, {name: item for name, item in tensors.items() if not name.startswith(FIT)}, path)
    own, result = fit.state, fit.result
    own.generator.set_state(state["order"])
    for name in ("noise_seed", "order", "told", "seconds"):
        setattr(own, name, state[name])
    own.chains = state["chains"].to(own.chains)
    own.log_step = None if state["log_step"] is None else state["log_step"].to(own.chains)
    load_optimizer(fit.optimizer, state["optimizer"])
    load_callbacks(callbacks, state["callbacks"])
    for name, buffer in passing_buffers(fit.program).items():
        buffer.copy_(state["buffers"][name])
    result.history, result.num_steps, result.num_updates = state["history"], state["num_steps"], state["num_updates"]
    compare_circumstances(state["circumstances"])
    restore_random_state(RandomState(**state["random"]))
    return True


def _setting(fit: StandingEM) -> dict[str, Any]:
    """Return what must be the same for a fit to be continued."""
    settings = fit.settings._asdict()
    return {
        "rows": fit.source.num_rows,
        "data": fingerprint(fit.source),
        "batch_size": fit.source.batch_size,
        "optimizer": type(fit.optimizer).__name__,
        **{name: settings[name] for name in ("num_leapfrog", "target_accept_prob", "num_weight_updates")},
    }
