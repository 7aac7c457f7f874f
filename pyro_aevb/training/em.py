r"""Monte Carlo EM: maximum likelihood without a guide, the paper's third contender (arXiv 1312.6114, section 5 and App. E).

Each row has a Markov chain of its own that follows its posterior while the parameters move. A step takes a batch, moves its rows'
chains by one HMC trajectory (E), and makes some updates of the parameters with the latents found there held fixed (M).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pyro
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Adagrad
from tqdm import tqdm

from pyro_aevb._types import PyroProgram, Scalar
from pyro_aevb.errors import DataError, ModelError, NonFiniteError, ParameterError, SettingError
from pyro_aevb.mcmc.adaptation import find_step_size
from pyro_aevb.mcmc.hmc import start, transition
from pyro_aevb.mcmc.noise import RowNoise, Stream
from pyro_aevb.program.batch import explained
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.parameters import Program
from pyro_aevb.program.particles import ParticleAxes, Records, run_program
from pyro_aevb.program.placing import Placing
from pyro_aevb.program.scaling import DataPlateScale
from pyro_aevb.program.settings import check_count, check_positive, check_share
from pyro_aevb.program.structure import read_structure
from pyro_aevb.randomness import seeded
from pyro_aevb.training.data import Batch, as_source
from pyro_aevb.training.stepper import OptimizerMaker

if TYPE_CHECKING:
    import pandas as pd

    from pyro_aevb.program.model_rows import ModelRows

__all__ = ["EMResult", "MonteCarloEM"]

_RATE = 0.3
"""By how much log step size moves for each unit that a batch's mean acceptance is off, all along."""
_JITTER = 0.2
"""By which part of it a row's step size varies. Without, step sizes settle where ten steps are a period of the dynamics: nearly
every trajectory is accepted there, because it leads back to where it began (Neal 2011, section 5.4.2.2)."""
_ADAGRAD_RATE = 0.02
"""One of the paper's three (0.01, 0.02, 0.1)."""


@dataclass
class EMResult:
    """What happened during Monte Carlo EM.

    Attributes:
        history: One dict per epoch: ``epoch``, ``log_joint`` (log p(x, z) at the chains' latents, nats per row: neither a bound on
            log p(x) nor an estimate of it, and not to be compared with one), ``acceptance``, ``step_size``, ``seconds``.
        num_steps: Batches taken.
        num_updates: Updates of the parameters.
        stopped_by: ``"epochs"`` or ``"interrupt"``.
        seconds_per_step: Mean wall-clock time of a batch.
        chains: Where each row's chain is, on unconstrained space: approximate draws from its posterior.
        program: The model's parameters.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    num_steps: int = 0
    num_updates: int = 0
    stopped_by: str = "epochs"
    seconds_per_step: float = float("nan")
    chains: Float[Tensor, "rows latent"] | None = None
    program: Program | None = None

    def to_pandas(self) -> "pd.DataFrame":
        """Return the history as a data frame, one row per epoch."""
        import pandas as pd

        return pd.DataFrame(self.history)

    def __repr__(self) -> str:
        """Tell in one line how it went."""
        if not self.history:
            return f"EMResult(no epoch finished, stopped_by={self.stopped_by!r})"
        last = self.history[-1]
        return (
            f"EMResult(log joint {last['log_joint']:.2f} nats per row (no bound), acceptance {last['acceptance']:.2f} after "
            f"{len(self.history)} epochs, {self.num_steps} steps, {self.num_updates} updates, "
            f"{1e3 * self.seconds_per_step:.2f} ms a step, stopped by {self.stopped_by})"
        )


class MonteCarloEM:
    r"""Maximum likelihood by Monte Carlo EM with Hamiltonian Monte Carlo (arXiv 1312.6114, App. E; Wei and Tanner 1990).

    A step takes a batch of M rows and their chains' latents z, and

    - E: moves each chain by one HMC trajectory under log p(x, z) of the present parameters, accepted or not,
    - M: ascends :math:`\frac{N}{M} \sum_m \log p(x_m, z_m)` by some updates with z held fixed.

    A row's chain goes on from where its last visit left it; the first one starts at a draw from the prior. All rows share a step
    size but for a jitter of 20 %; it approaches the wanted acceptance and is never frozen, as the parameters never stand still.
    Draws therefore follow the posterior with a lag, so that the parameters end near the maximum of the likelihood and not at it.

    There is no guide and no bound. To judge the model, estimate log p(x) of held-out rows:
    ``log_marginal(model, None, x, method="ais")``. Costs ``num_leapfrog + 1`` gradients by the latents and ``num_weight_updates``
    by the parameters a step. Latents must be continuous and lie in the data plate; modules run in eval mode in the E step, in
    train mode in the M step.

    Args:
        model: The model. Latents outside its data plate must be parameters instead.
        num_leapfrog: Leapfrog steps of a trajectory.
        target_accept_prob: Mean acceptance probability over a batch that the step size approaches.
        num_weight_updates: Updates of the parameters a step.
        data_plate: Name of the plate whose indices are rows, or ``"auto"``.

    Attributes:
        program: The model's parameters; a second fit goes on from them, with new chains.

    Raises:
        SettingError: If a setting is out of range.

    Example:
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = 3.0 + 2**0.5 * torch.randn(200)
        >>> em = MonteCarloEM(model, num_leapfrog=5)
        >>> result = em.fit(x, num_epochs=10, learning_rate=0.5, seed=0, progress=False)
        >>> bool((pyro.param("loc") - x.mean()).abs() < 0.3)  # the maximum of the likelihood is the mean
        True
    """

    def __init__(
        self,
        model: PyroProgram,
        *,
        num_leapfrog: int = 10,
        target_accept_prob: float = 0.9,
        num_weight_updates: int = 5,
        data_plate: str = "auto",
    ) -> None:
        check_count("num_leapfrog", num_leapfrog)
        check_count("num_weight_updates", num_weight_updates)
        check_share("target_accept_prob", target_accept_prob)
        self.model = model
        self.num_leapfrog = num_leapfrog
        self.target_accept_prob = target_accept_prob
        self.num_weight_updates = num_weight_updates
        self.data_plate = data_plate
        self.program = Program(model, _no_guide)

    def fit(
        self,
        data: Any,
        *,
        num_epochs: int = 10,
        batch_size: int | None = None,
        optimizer: OptimizerMaker | None = None,
        learning_rate: float | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> EMResult:
        """Fit the model's parameters to data.

        Args:
            data: A tensor, a tuple, list or mapping of tensors (or numpy arrays) with rows on axis 0, all in memory and where the
                parameters are, since every row keeps a chain.
            num_epochs: Passes over the data.
            batch_size: Rows in a batch, at most 100 by default.
            optimizer: A callable of the parameters that returns a torch optimizer; by default Adagrad, as in the paper.
            learning_rate: Of the default optimizer; by default 0.02.
            seed: Seed of everything that is drawn; the generators are left as they were.
            progress: Whether to show a progress bar.

        Returns:
            The history. Parameters are trained in place, in modules; values of ``pyro.param`` are written to the global param
            store, where a name that something else holds is left alone. Ctrl-C ends the fit with the last state.

        Raises:
            SettingError: If a setting is out of range.
            DataError: If the data are empty, no tensors, or hold NaN where a density reads them.
            ModelError: If the model has latents outside the data plate, is not supported, or draws rows by itself.
            ParameterError: If the model has no parameters.
            NonFiniteError: If log p(x, z) or its gradient is NaN or infinite; the parameters are those before that update.
        """
        check_count("num_epochs", num_epochs)
        make = _optimizer_maker(optimizer, learning_rate)
        source = as_source(data, batch_size)
        whole = source.whole()
        if whole is None or source.batch_size is None:
            raise DataError(f"Each row keeps a chain: give all rows as tensors, got {type(data).__name__}.")
        with seeded(seed):
            density = self._read(whole, source.batch_size)
            parameters = [parameter for parameter in self.program.parameters() if parameter.requires_grad]
            if not parameters:
                raise ParameterError(
                    "The model has no parameters to train. Register networks with pyro.module, make them attributes of the model's "
                    "nn.Module, or use pyro.param."
                )
            run = _Run(self, density, make(parameters), source.batch_size)
            return run.epochs(num_epochs, progress=progress)

    def _read(self, whole: Batch, batch_size: int) -> LogDensity:
        """Make the parameters, and refuse models without rows of their own."""
        args, kwargs = whole
        with self.program.building(), pyro.validation_enabled(False), explained("model", args, kwargs):
            structure = read_structure(self.model, args, kwargs, data_plate=self.data_plate)
            names = [site.name for site in structure.select("latent", is_local=False)]
            if names:
                raise ModelError(
                    f"Monte Carlo EM samples latents inside the data plate, and the model has the global latents {names}. Make "
                    f"them parameters (pyro.param).",
                    site=names[0],
                )
            if structure.draws_own_rows:
                raise ModelError(
                    f"The model draws rows of plate {structure.data_plate!r} by itself, so that no chain could follow a row. Size "
                    f"the plate by the batch: pyro.plate({structure.data_plate!r}, len(x))."
                )
            density = LogDensity(self.model, *args, data_plate=structure.data_plate, **kwargs)
            density.require_latents()
        if density.chunk_rows is not None and batch_size != density.num_rows:
            raise SettingError(
                f"The model runs with all {density.num_rows} rows at once: give batch_size={density.num_rows}."
            )
        return density


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """Sample nothing."""


def _optimizer_maker(optimizer: OptimizerMaker | None, learning_rate: float | None) -> OptimizerMaker:
    """Return the given maker or that of Adagrad."""
    if optimizer is None:
        rate = _ADAGRAD_RATE if learning_rate is None else learning_rate
        check_positive("learning_rate", rate)
        return lambda parameters: Adagrad(parameters, lr=rate)
    if learning_rate is not None:
        raise SettingError(
            "learning_rate belongs to the default optimizer; give it to your own with functools.partial."
        )
    if not callable(optimizer):
        raise SettingError(
            f"optimizer must be a callable of the parameters, such as torch.optim.Adam; got {optimizer!r}."
        )
    return optimizer


class _Run:
    """Chains, step size and optimizer of one fit.

    Args:
        em: The settings and the model's parameters.
        density: log p(x, z) of all rows.
        optimizer: The optimizer.
        batch_size: Rows in a batch.
    """

    def __init__(
        self, em: MonteCarloEM, density: LogDensity, optimizer: torch.optim.Optimizer, batch_size: int
    ) -> None:
        self.em, self.density, self.optimizer, self.batch_size = em, density, optimizer, batch_size
        self.rows = cast("ModelRows", density.source)
        self.noise = RowNoise(
            int(torch.randint(2**31, ())), torch.arange(density.num_rows), dtype=density.dtype, device=density.device
        )
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        with self._running():
            self.chains = density.draw_prior(1, seed=int(torch.randint(2**31, ())))
        self.log_step: Tensor | None = None
        self.result = EMResult(program=em.program)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Run the model with the program's parameters and the scale of a batch."""
        scale = DataPlateScale(self.rows.structure.data_plate, self.density.num_rows)
        with pyro.validation_enabled(False), self.em.program.running(scale):
            yield

    def epochs(self, num_epochs: int, *, progress: bool) -> EMResult:
        """Take steps until the epochs are done or Ctrl-C."""
        program, result = self.em.program, self.result
        modes = [(module, module.training) for module in program.modules()]
        steps, begin = num_epochs * -(-self.density.num_rows // self.batch_size), time.perf_counter()
        program.train()
        try:
            with self._running(), tqdm(total=steps, disable=not progress, unit="step", dynamic_ncols=True) as bar:
                for epoch in range(1, num_epochs + 1):
                    self._epoch(epoch, bar)
        except KeyboardInterrupt:
            result.stopped_by = "interrupt"
        finally:
            for module, mode in modes:
                module.training = mode
            result.seconds_per_step = (time.perf_counter() - begin) / max(1, result.num_steps)
            result.chains = self.chains[0]
            program.write_param_store()
        return result

    def _epoch(self, epoch: int, bar: "tqdm[Any]") -> None:
        """Visit every row once."""
        begin, told = time.perf_counter(), []
        for rows in torch.randperm(self.density.num_rows, generator=self.generator).split(self.batch_size):
            log_joint, acceptance = self._step(rows)
            told.append((len(rows), log_joint, acceptance))
            bar.update()
            bar.set_postfix_str(f"epoch {epoch}, log joint {log_joint:.2f}, acceptance {acceptance:.2f}", refresh=False)
        counts, *columns = torch.tensor(told, dtype=torch.float64).T
        means = [float((counts * column).sum() / counts.sum()) for column in columns]
        record = {"epoch": float(epoch), "log_joint": means[0], "acceptance": means[1]}
        record |= {"step_size": float(torch.as_tensor(self.log_step).exp()), "seconds": time.perf_counter() - begin}
        self.result.history.append(record)

    def _step(self, rows: Int[Tensor, " batch"]) -> tuple[float, float]:
        """Move the chains of some rows, update the parameters, and return log p(x, z) before that, nats a row, and acceptance."""
        acceptance = self._expect(rows)
        args, kwargs = self.rows.data_of(rows)
        u = self.chains[:, rows.to(self.chains.device)][None]
        log_joints = []
        for _ in range(self.em.num_weight_updates):
            loss, log_joint = self._loss(args, kwargs, u)
            self._update(loss)
            log_joints.append(log_joint)
        self.result.num_steps += 1
        return log_joints[0], acceptance

    @torch.no_grad()
    def _expect(self, rows: Int[Tensor, " batch"]) -> float:
        """Move the rows' chains by one trajectory, adapt the step size, and return the mean acceptance."""
        em, target = self.em, self.density.rows(rows).log_joint
        noise, place = self.noise.rows(rows.to(self.noise.indices.device)), rows.to(self.chains.device)
        state = start(target, self.chains[:, place])
        scale = torch.ones_like(state.position[0])
        if self.log_step is None:
            first = find_step_size(target, state, noise, scale=scale, accept_prob=em.target_accept_prob)
            self.log_step = first.log().mean()
        number = self.result.num_steps
        state, info = transition(
            target,
            state,
            noise.normal(Stream.MOMENTUM, number, 1, self.density.dim),
            noise.uniform(Stream.ACCEPT, number, 1),
            step_size=self.log_step.exp() * (1 + _JITTER * (2 * noise.uniform(Stream.JITTER, number, 1)[0] - 1)),
            scale=scale,
            num_leapfrog=em.num_leapfrog,
        )
        self.chains[:, place] = state.position
        acceptance = info.acceptance.mean()
        self.log_step = self.log_step + _RATE * (acceptance - em.target_accept_prob)
        return float(acceptance)

    def _loss(self, args: tuple[Any, ...], kwargs: Any, u: Float[Tensor, "1 1 batch latent"]) -> tuple[Scalar, float]:
        """Return minus log p(x, u) over the data set, and log p(x, z) in nats per row.

        The Jacobian between u and z matters to parameters only where they move a support; there z would fall out of it.
        """
        structure = self.rows.structure
        with Placing(self.rows.model.layout, u) as placing:
            records = run_program(self.em.model, structure, ParticleAxes(), args, kwargs)
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
