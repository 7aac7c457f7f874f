"""One fit by Monte Carlo EM: its chains, its updates, and what it needs to be continued from where it stands."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PyroProgram, Scalar
from pyro_aevb.errors import NonFiniteError, SettingError
from pyro_aevb.mcmc.adaptation import find_step_size
from pyro_aevb.mcmc.hmc import start, transition
from pyro_aevb.mcmc.noise import RowNoise, Stream
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.parameters import Program
from pyro_aevb.program.particles import ParticleAxes, Records, run_program
from pyro_aevb.program.placing import Placing
from pyro_aevb.program.scaling import DataPlateScale
from pyro_aevb.training.checkpoint import Checkpoints
from pyro_aevb.training.data import BatchSource
from pyro_aevb.training.em_continuation import EMState, collect_em, load_em
from pyro_aevb.training.interruption import Interruption
from pyro_aevb.training.result import EMEpochEnd, EMResult

if TYPE_CHECKING:
    from pyro_aevb.program.model_rows import ModelRows

__all__ = ["EMPlan", "EMRun", "EMSettings"]

_RATE = 0.3
"""By how much log step size moves for each unit that a batch's mean acceptance is off, all along."""
_JITTER = 0.2
"""By which part of it a row's step size varies. Without, step sizes settle where ten steps are a period of the dynamics: nearly
every trajectory is accepted there, because it leads back to where it began (Neal 2011, section 5.4.2.2)."""


class EMSettings(NamedTuple):
    """What a step does.

    Attributes:
        model: The model.
        num_leapfrog: Leapfrog steps of a trajectory.
        target_accept_prob: Mean acceptance probability that the step size approaches.
        num_weight_updates: Updates of the parameters a step.
    """

    model: PyroProgram
    num_leapfrog: int
    target_accept_prob: float
    num_weight_updates: int


class EMPlan(NamedTuple):
    """How long to go on, and who is told.

    Attributes:
        num_epochs: Passes over the data, from the beginning.
        callbacks: Called after each epoch.
        checkpoints: Where to write, and what to continue.
        every: Batches from one checkpoint to the next; ``None`` for one after each epoch.
        progress: Whether to show a progress bar.
    """

    num_epochs: int
    callbacks: Sequence[Callable[[EMEpochEnd], bool | None]]
    checkpoints: Checkpoints | None
    every: int | None
    progress: bool


class EMRun:
    """Chains, step size and optimizer of one fit.

    Args:
        settings: What a step does.
        program: The model's parameters, built.
        density: log p(x, z) of all rows.
        optimizer: The optimizer.
        source: The rows, all in memory.
    """

    def __init__(
        self,
        settings: EMSettings,
        program: Program,
        density: LogDensity,
        optimizer: torch.optim.Optimizer,
        source: BatchSource,
    ) -> None:
        self.settings, self.program, self.density, self.source = settings, program, density, source
        self.rows = cast("ModelRows", density.source)
        self.structure = self.rows.structure
        self.optimizer = optimizer
        noise_seed = int(torch.randint(2**31, ()))
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        with self._running():
            chains = density.draw_prior(1, seed=int(torch.randint(2**31, ())))
        self.state = EMState(noise_seed, generator, generator.get_state(), chains)
        self.result = EMResult(program=program)
        self._num_saved = -1
        self._interruption = Interruption()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Run the model with the program's parameters and the scale of a batch."""
        scale = DataPlateScale(self.structure.data_plate, self.density.num_rows)
        with pyro.validation_enabled(False), self.program.running(scale):
            yield

    def run(self, plan: EMPlan) -> EMResult:
        """Take steps until the epochs are done, a callback says so, or a signal comes."""
        result = self.result
        modes = [(module, module.training) for module in self.program.modules()]
        signals: Any = nullcontext() if plan.checkpoints is None else self._interruption
        folder: Any = nullcontext() if plan.checkpoints is None else plan.checkpoints.locked()
        try:
            with signals, folder, self._running(), self._bar(plan) as bar:
                self._continue(plan)
                bar.update(result.num_steps)
                self.program.train()
                self._epochs(plan, bar)
                self._save(plan)
        except KeyboardInterrupt:
            result.stopped_by = "interrupt"
        finally:
            for module, mode in modes:
                module.training = mode
            seconds = sum(record["seconds"] for record in result.history) + self.state.seconds
            result.seconds_per_step = seconds / max(1, result.num_steps)
            result.chains = self.state.chains[0]
            self.program.write_param_store()
        self._interruption.obey()
        return result

    def _bar(self, plan: EMPlan) -> "tqdm[Any]":
        steps = plan.num_epochs * (self.source.num_batches() or 0)
        return tqdm(total=steps, disable=not plan.progress, unit="step", dynamic_ncols=True)

    def _continue(self, plan: EMPlan) -> None:
        """Go to where the latest checkpoint was written, if there is one."""
        if plan.checkpoints is None or not load_em(self, plan.checkpoints, plan.callbacks):
            return
        self._num_saved = self.result.num_steps
        if len(self.result.history) > plan.num_epochs:
            raise SettingError(
                f"The checkpoint has {len(self.result.history)} epochs behind it, more than num_epochs={plan.num_epochs}, which "
                f"counts from the beginning. Give at least as many."
            )

    def _save(self, plan: EMPlan) -> None:
        """Write a checkpoint, unless this place has one."""
        if plan.checkpoints is not None and self._num_saved != self.result.num_steps:
            plan.checkpoints.write(self.result.num_steps, collect_em(self, plan.callbacks))
            self._num_saved = self.result.num_steps

    def _epochs(self, plan: EMPlan, bar: "tqdm[Any]") -> None:
        """Run epoch after epoch."""
        while len(self.result.history) < plan.num_epochs and self.result.stopped_by == "epochs":
            if not self.state.told:
                self.state.order = self.state.generator.get_state()
            self._epoch(plan, bar)
            if self._interruption.signal is not None:
                self.result.stopped_by = "sigterm" if self._interruption.signal == SIGTERM else "interrupt"
                return
            self._end_epoch(plan)

    def _epoch(self, plan: EMPlan, bar: "tqdm[Any]") -> None:
        """Visit every row once, or those that are left of an epoch."""
        state, begin = self.state, time.perf_counter() - self.state.seconds
        if self._interruption.signal is not None:
            return  # before an order is drawn that nobody follows
        order = torch.randperm(self.density.num_rows, generator=state.generator)
        for rows in order.split(self.source.batch_size or self.density.num_rows)[len(state.told) :]:
            if self._interruption.signal is not None:
                return
            log_joint, acceptance = self._step(rows)
            state.told.append([float(len(rows)), log_joint, acceptance])
            state.seconds = time.perf_counter() - begin
            bar.update()
            epoch = len(self.result.history) + 1
            bar.set_postfix_str(f"epoch {epoch}, log joint {log_joint:.2f}, acceptance {acceptance:.2f}", refresh=False)
            if plan.every is not None and self.result.num_steps % plan.every == 0:
                self._save(plan)

    def _end_epoch(self, plan: EMPlan) -> None:
        """Record the epoch, call back, and save."""
        state, history = self.state, self.result.history
        counts, *columns = torch.tensor(state.told, dtype=torch.float64).T
        log_joint, acceptance = (float((counts * column).sum() / counts.sum()) for column in columns)
        record = {"epoch": float(len(history) + 1), "log_joint": log_joint, "acceptance": acceptance}
        record |= {"step_size": float(torch.as_tensor(state.log_step).exp()), "seconds": state.seconds}
        history.append(record)
        state.told, state.seconds, self._num_saved = [], 0.0, -1  # a checkpoint from before this epoch's end is another
        event = EMEpochEnd(len(history), record, self.program)
        if sum(callback(event) is True for callback in plan.callbacks):
            self.result.stopped_by = "callback"
        if plan.every is None:
            self._save(plan)

    def _step(self, rows: Int[Tensor, " batch"]) -> tuple[float, float]:
        """Move the chains of some rows, update the parameters, and return log p(x, z) before that, nats a row, and acceptance."""
        acceptance = self._expect(rows)
        args, kwargs = self.rows.data_of(rows)
        u = self.state.chains[:, rows.to(self.state.chains.device)][None]
        log_joints = []
        for _ in range(self.settings.num_weight_updates):
            loss, log_joint = self._loss(args, kwargs, u)
            self._update(loss)
            log_joints.append(log_joint)
        self.result.num_steps += 1
        return log_joints[0], acceptance

    @torch.no_grad()
    def _expect(self, rows: Int[Tensor, " batch"]) -> float:
        """Move the rows' chains by one trajectory, adapt the step size, and return the mean acceptance."""
        settings, own, target = self.settings, self.state, self.density.rows(rows).log_joint
        place = rows.to(own.chains.device)
        noise = RowNoise(own.noise_seed, place, dtype=self.density.dtype, device=self.density.device)
        state = start(target, own.chains[:, place])
        scale = torch.ones_like(state.position[0])
        if own.log_step is None:
            first = find_step_size(target, state, noise, scale=scale, accept_prob=settings.target_accept_prob)
            own.log_step = first.log().mean()
        number = self.result.num_steps
        state, info = transition(
            target,
            state,
            noise.normal(Stream.MOMENTUM, number, 1, self.density.dim),
            noise.uniform(Stream.ACCEPT, number, 1),
            step_size=own.log_step.exp() * (1 + _JITTER * (2 * noise.uniform(Stream.JITTER, number, 1)[0] - 1)),
            scale=scale,
            num_leapfrog=settings.num_leapfrog,
        )
        own.chains[:, place] = state.position
        acceptance = info.acceptance.mean()
        own.log_step = own.log_step + _RATE * (acceptance - settings.target_accept_prob)
        return float(acceptance)

    def _loss(self, args: tuple[Any, ...], kwargs: Any, u: Float[Tensor, "1 1 batch latent"]) -> tuple[Scalar, float]:
        """Return minus log p(x, u) over the data set, and log p(x, z) in nats per row.

        The Jacobian between u and z matters to parameters only where they move a support; there z would fall out of it.
        """
        structure = self.structure
        with Placing(self.rows.model.layout, u) as placing:
            records = run_program(self.settings.model, structure, ParticleAxes(), args, kwargs)
        records = {name: site for name, site in records.items() if structure.sites[name].kind != "imputed"}
        local = _sum(records, is_local=True)
        jacobians = [records[name].reduce([jacobian]).sum() for name, jacobian in placing.log_jacobians.items()]
        scale = next(site.data_scale or 1.0 for site in records.values() if site.is_local)
        total = scale * (local + sum(jacobians, torch.zeros_like(local))) + _sum(records, is_local=False)
        if not bool(total.isfinite()):
            raise _non_finite(records)
        return -total, float(local.detach()) / u.shape[2]

    def _update(self, loss: Scalar) -> None:
        """Take one step of the optimizer."""
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [item.grad for group in self.optimizer.param_groups for item in group["params"]]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None):
            raise NonFiniteError(
                "The gradient of log p(x, z) is NaN or infinite while every density is finite: look for sqrt or log of 0 in the "
                "model. The parameters are those before this update."
            )
        self.optimizer.step()
        self.result.num_updates += 1


def _sum(records: Records, *, is_local: bool) -> Scalar:
    """Sum the log densities of sites inside or outside the data plate."""
    like = next(site.log_prob for site in records.values())
    return sum((site.log_prob.sum() for site in records.values() if site.is_local == is_local), like.new_zeros(()))


def _non_finite(records: Records) -> NonFiniteError:
    name = next((name for name, site in records.items() if not bool(site.log_prob.isfinite().all())), None)
    return NonFiniteError(
        f"log p(x, z) is NaN or infinite at site {name!r}. Look at the data and the parameters that reach this site, or lower the "
        f"learning rate. The parameters are those before this update.",
        site=name,
    )
