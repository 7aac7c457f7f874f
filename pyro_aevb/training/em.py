r"""Monte Carlo EM: maximum likelihood without a guide, the paper's third contender (arXiv 1312.6114, section 5 and App. E).

Each row has a Markov chain of its own that follows its posterior while the parameters move. A step takes a batch, moves its rows'
chains by one HMC trajectory (E), and makes some updates of the parameters with the latents found there held fixed (M).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
from torch.optim import Adagrad

from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import DataError, ModelError, ParameterError, SettingError
from pyro_aevb.program.batch import explained
from pyro_aevb.program.density import LogDensity
from pyro_aevb.program.parameters import Program
from pyro_aevb.program.settings import check_count, check_positive, check_share
from pyro_aevb.program.structure import read_structure
from pyro_aevb.randomness import seeded
from pyro_aevb.training.checkpoint import Checkpoints
from pyro_aevb.training.data import Batch, as_source
from pyro_aevb.training.em_run import EMPlan, EMRun, EMSettings
from pyro_aevb.training.fit_settings import check_checkpoint, check_makers, check_together
from pyro_aevb.training.result import EMEpochEnd, EMResult
from pyro_aevb.training.stepper import OptimizerMaker

__all__ = ["EMResult", "MonteCarloEM"]

_ADAGRAD_RATE = 0.02
"""One of the paper's three (0.01, 0.02, 0.1)."""


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
        callbacks: Sequence[Callable[[EMEpochEnd], bool | None]] = (),
        checkpoint: str | Path | None = None,
        every: int | None = None,
        keep: int = 3,
        resume: bool = False,
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
            callbacks: Called after each epoch with :class:`~pyro_aevb.training.result.EMEpochEnd`; returning ``True`` ends the fit.
            checkpoint: A folder for checkpoints, from which a fit that was stopped continues; SIGTERM and Ctrl-C then wait for the
                end of a step and one more checkpoint. Each is a file, written whole or not at all.
            every: Batches from one checkpoint to the next; by default one after each epoch.
            keep: How many of the last checkpoints stay.
            resume: Whether to continue from the folder's latest checkpoint, bit for bit as if the fit had not been stopped:
                parameters, chains, step size, optimizer, generators, place in the epoch, history. ``seed`` and the optimizer's
                settings are then those of the checkpoint; ``num_epochs`` counts from the beginning and may be another. An empty
                folder begins anew.
            progress: Whether to show a progress bar.

        Returns:
            The history. Parameters are trained in place, in modules; values of ``pyro.param`` are written to the global param
            store, where a name that something else holds is left alone. Ctrl-C ends the fit with the last state and is told in
            ``stopped_by``.

        Raises:
            SettingError: If a setting is out of range.
            DataError: If the data are empty, no tensors, or hold NaN where a density reads them.
            ModelError: If the model has latents outside the data plate, is not supported, or draws rows by itself.
            ParameterError: If the model has no parameters.
            FileError: If a checkpoint can't be written, is damaged, or is one of another model; or if the folder holds checkpoints
                and ``resume`` is not set.
            SystemExit: With status 143 after SIGTERM, if there are checkpoints and the process has no handler of its own.
            NonFiniteError: If log p(x, z) or its gradient is NaN or infinite; the parameters are those before that update.
        """
        check_count("num_epochs", num_epochs)
        check_makers(optimizer, None, callbacks)
        check_together(optimizer, learning_rate)
        check_checkpoint(checkpoint, every, keep, resume=resume)
        rate = _ADAGRAD_RATE if learning_rate is None else learning_rate
        check_positive("learning_rate", rate)
        make = optimizer or partial(Adagrad, lr=rate)
        source = as_source(data, batch_size)
        whole = source.whole()
        if whole is None or source.batch_size is None:
            raise DataError(f"Each row keeps a chain: give all rows as tensors, got {type(data).__name__}.")
        checkpoints = None if checkpoint is None else Checkpoints(checkpoint, keep=keep, resume=resume)
        with seeded(seed):
            density = self._read(whole, source.batch_size)
            parameters = [parameter for parameter in self.program.parameters() if parameter.requires_grad]
            if not parameters:
                raise ParameterError(
                    "The model has no parameters to train. Register networks with pyro.module, make them attributes of the model's "
                    "nn.Module, or use pyro.param."
                )
            settings = EMSettings(self.model, self.num_leapfrog, self.target_accept_prob, self.num_weight_updates)
            run = EMRun(settings, self.program, density, make(parameters), source)
            return run.run(EMPlan(num_epochs, callbacks, checkpoints, every, progress))

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
