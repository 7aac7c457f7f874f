"""Fit model and guide to data: Algorithm 1 of arXiv 1312.6114 on Lightning Fabric's devices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro.infer import ELBO
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_aevb._types import PyroProgram
from pyro_aevb.program.compiling import Compile, check_compile
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.processes import Processes
from pyro_aevb.program.settings import NumData, check_count, check_num_data, check_settings
from pyro_aevb.randomness import seeded
from pyro_aevb.training.checkpoint import Checkpoints
from pyro_aevb.training.data import as_source
from pyro_aevb.training.epochs import Epochs, Plan
from pyro_aevb.training.fit_settings import (
    check_checkpoint,
    check_makers,
    check_numbers,
    check_objective,
    check_together,
    make_schedule,
)
from pyro_aevb.training.loggers import LoggerSetting, find_loggers
from pyro_aevb.training.preparation import prepare, prepare_validation
from pyro_aevb.training.result import EpochEnd, FitResult
from pyro_aevb.training.sharding import share
from pyro_aevb.training.staged import Staging
from pyro_aevb.training.stepper import OptimizerMaker, Stepper, default_optimizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["EpochEnd", "FitResult", "fit", "fit_module"]

ScheduleMaker = Callable[[Optimizer], LRScheduler]


def fit(
    model: PyroProgram,
    guide: PyroProgram,
    objective: ELBO,
    data: Any,
    *,
    num_data: NumData = None,
    effective_num_data: int | None = None,
    data_plate: str | None = "auto",
    **settings: Any,
) -> FitResult:
    """Fit model and guide to data, for users who do without :class:`~pyro_aevb.AEVB`.

    Args:
        model: The model.
        guide: The guide; Pyro's AutoGuides are guides too.
        objective: :class:`~pyro_aevb.SGVB`, :class:`~pyro_aevb.IWELBO`, :class:`~pyro_aevb.WakeSleep`,
            :class:`~pyro_aevb.ReweightedWakeSleep`, or a loss of Pyro's that has ``differentiable_loss``.
        data: A tensor, a tuple, list or mapping of tensors (or numpy arrays) with rows on axis 0, a Dataset, a DataLoader, or an
            iterator of batches (a generator), which is passed through once.
        num_data: Rows of the whole data set; by default those of ``data``. A stream has no length: ``"growing"`` takes the rows
            seen so far, each time that they are seen.
        effective_num_data: In place of ``num_data``, for data that drift: how many recent rows the globals should know.
        data_plate: Name of the plate whose indices are rows, ``"auto"`` or ``None`` (no rows: every step gets all data).
        **settings: The settings of :func:`fit_module`.

    Returns:
        The history. Parameters are trained in place, in modules; values of ``pyro.param`` are written to the global param
        store, where a name that something else holds is left alone.

    Raises:
        SettingError: If a setting is out of range, the objective has no ``differentiable_loss``, or there are globals and nothing
            says how many rows there are.
        DataError: If the data are empty, hold NaN or infinity where a density reads them, or lie outside a support.
        ModelError: If the model is not supported.
        GuideError: If the guide does not fit the model.
        NonFiniteError: If the loss stays NaN or infinite.

    Example:
        >>> from pyro_aevb import SGVB, fit
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(a + b * x, 0.7))
        >>> x = 3.0 + 2**0.5 * torch.randn(1000)
        >>> result = fit(model, guide, SGVB(), x, num_epochs=30, learning_rate=0.03, seed=0, progress=False)
        >>> bool((pyro.param("loc") - x.mean()).abs() < 0.1)
        True
    """
    check_settings(settings, fit_module)
    plate = getattr(objective, "data_plate", "auto") if data_plate == "auto" else data_plate
    num_data = check_num_data(num_data, effective_num_data)
    module = ObjectiveModule(model, guide, objective, num_data=num_data, data_plate=plate)
    return fit_module(module, data, **settings)


def fit_module(
    module: ObjectiveModule,
    data: Any,
    *,
    num_epochs: int = 10,
    batch_size: int | None = None,
    optimizer: OptimizerMaker | None = None,
    learning_rate: float | None = None,
    schedule: ScheduleMaker | None = None,
    clip_norm: float | None = None,
    validation: Any = None,
    patience: int | None = None,
    seed: int | None = None,
    fabric: "Fabric | None" = None,
    compile: Compile = "auto",  # noqa: A002  torch's own word
    max_skipped: int = 10,
    callbacks: Sequence[Callable[[EpochEnd], bool | None]] = (),
    checkpoint: str | Path | None = None,
    every: int | None = None,
    keep: int = 3,
    resume: bool = False,
    logger: LoggerSetting = None,
    progress: bool = True,
) -> FitResult:
    """Fit a module of model, guide and objective to data.

    Args:
        module: Model, guide and objective.
        data: As in :func:`fit`.
        num_epochs: Passes over the data.
        batch_size: Rows in a batch of each process, at most 100 by default.
        optimizer: A callable of the parameters that returns a torch optimizer; by default fused Adam.
        learning_rate: Of the default optimizer, 1e-3 by default.
        schedule: A callable of the optimizer that returns a learning-rate scheduler, stepped after each epoch;
            ``ReduceLROnPlateau`` gets minus the (validation) bound.
        clip_norm: Largest norm of the gradient over all parameters.
        validation: Held-out data in any form; their bound per row is taken after each epoch, under fixed noise, in eval mode,
            without the globals' part.
        patience: Epochs without a better validation bound after which the fit stops; the best state is restored then.
        seed: Seed of everything random in the fit; the generators are left as they were. One seed gives the same parameters bit
            for bit on one machine with one number of threads (and of processes).
        fabric: A ``lightning_fabric.Fabric`` for devices and processes; by default the device of the parameters. With several
            processes each is given all data, and takes its part of every batch (:mod:`pyro_aevb.training.sharding`).
        compile: Whether to record and compile the training step for batches of the first one's shapes: ``True``, ``False``, or
            ``"auto"`` where the steps ahead repay it. With torch's Adam on one process that is loss, gradient and update in one
            graph, else loss and gradient. The numbers are those of eager steps under one seed, to rounding; where they are not,
            or a C++ compiler is missing, steps run eagerly after a warning. ``execution`` of the result says what was chosen.
        max_skipped: Steps in a row that may be skipped because loss or gradient is not finite.
        callbacks: Called after each epoch with :class:`EpochEnd`; returning ``True`` ends the fit. One that has a method
            ``finish`` gets the result once the fit is over, at the parameters that it leaves behind.
        checkpoint: A folder for checkpoints, from which a fit that was stopped continues; SIGTERM and Ctrl-C then wait for the end
            of a step and one more checkpoint. Each is a file that :meth:`~pyro_aevb.AEVB.load` reads too, written whole or not at
            all. ``best.safetensors`` is that of the best validation bound.
        every: Batches from one checkpoint to the next; by default one after each epoch, as always for a given DataLoader, whose
            epochs can't be entered in the middle.
        keep: How many of the last checkpoints stay.
        resume: Whether to continue from the folder's latest checkpoint, bit for bit as if the fit had not been stopped: parameters,
            optimizer, schedule, generators, place in the epoch, history, patience, the decision to compile. ``seed`` and the
            optimizer's settings are then those of the checkpoint; ``num_epochs`` counts from the beginning and may be another. An
            empty folder begins anew.
        logger: ``"csv"`` or ``"tensorboard"``, written below ``checkpoint`` (else ``logs``), or loggers of Lightning Fabric, beside
            those of ``fabric``: they get each epoch's record, and the bound of every 100th batch as ``step_bound``.
        progress: Whether to show a progress bar.

    Returns:
        The history. Ctrl-C ends the fit with the last state and is told in ``stopped_by``.

    Raises:
        SettingError: If a setting is out of range, or a checkpoint is one of another setting.
        FileError: If a checkpoint can't be written (parameters are then those of the last step), is damaged, or is one of another
            model; or if the folder holds checkpoints and ``resume`` is not set.
        SystemExit: With status 143 after SIGTERM, if there are checkpoints and the process has no handler of its own.
        NonFiniteError: If too many steps in a row were skipped; parameters are those of the last good step.
        ProcessError: If another process has ended, or does not answer within the process group's timeout.
    """
    check_objective(module.objective)
    check_count("num_epochs", num_epochs)
    check_numbers(learning_rate, clip_norm, patience, max_skipped)
    check_makers(optimizer, schedule, callbacks)
    check_together(optimizer, learning_rate, patience, validation)
    check_checkpoint(checkpoint, every, keep, resume=resume)
    check_compile(compile)
    checkpoints = None if checkpoint is None else Checkpoints(checkpoint, keep=keep, resume=resume)
    loggers = find_loggers(logger, checkpoint or "logs")
    processes = Processes(fabric)
    source = share(as_source(data, batch_size), processes)
    with seeded(processes.agree_on_seed(seed)):
        source = prepare(module, source, batch_size)
        held_out = None if validation is None else prepare_validation(module, validation)
        make = optimizer or default_optimizer(learning_rate or 1e-3)
        steps = source.num_batches()
        staging = Staging(compile=compile, num_steps=None if steps is None else steps * num_epochs)
        stepper = Stepper(module, make, clip_norm=clip_norm, fabric=fabric, max_skipped=max_skipped, staging=staging)
        stepper.checks_supports = source.whole() is None
        plan = Plan(num_epochs, patience, callbacks, progress, every, [*stepper.fabric.loggers, *loggers])
        epochs = Epochs(module, stepper, source, plan, held_out, checkpoints)
        epochs.schedule = make_schedule(schedule, stepper.optimizer)
        processes.draw_apart()
        return epochs.run()
