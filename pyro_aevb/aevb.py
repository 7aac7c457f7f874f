"""The wrapper that a user meets: a model, a guide and an objective that belong together."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.diagnostics.report import TrustReport, trust_report
from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.evidence.marginal import find_method, log_marginal
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.guides.normal import AutoAmortizedNormal
from pyro_aevb.guides.saving import read_guide
from pyro_aevb.imputation.impute import impute
from pyro_aevb.imputation.result import Imputation
from pyro_aevb.objectives.base import Objective
from pyro_aevb.objectives.naming import rebuild_objective
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.prediction import embed, posterior, predict, reconstruct, simulate
from pyro_aevb.program.compiling import Compile, check_compile
from pyro_aevb.program.devices import check_device
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.settings import NumData, check_covariates, check_num_data, check_positive, check_settings
from pyro_aevb.randomness import seeded
from pyro_aevb.training.batches import Batch, as_batch, check_batch, describe
from pyro_aevb.training.files import read_file, write_file
from pyro_aevb.training.loop import FitResult, fit_module
from pyro_aevb.training.preparation import build, check_size
from pyro_aevb.training.saving import describe_program, restore
from pyro_aevb.training.staged import Staging
from pyro_aevb.training.stepper import Stepper, default_optimizer

__all__ = ["AEVB"]


class AEVB:
    """Auto-Encoding Variational Bayes for a Pyro model: fit it, draw posteriors of new rows, weigh them.

    Every method takes the batch that model and guide take and delegates to a public function of the same meaning.

    Args:
        model: A Pyro model written for a batch: a function, an ``nn.Module``, a ``PyroModule`` or a method of one.
        guide: A guide with the model's arguments; by default :class:`~pyro_aevb.AutoAmortizedNormal`, which builds itself.
        objective: What training maximizes, by default :class:`~pyro_aevb.SGVB`; :class:`~pyro_aevb.IWELBO`,
            :class:`~pyro_aevb.WakeSleep`, :class:`~pyro_aevb.ReweightedWakeSleep` or a loss of Pyro's are others.
        data_plate: Name of the plate whose indices are rows; ``"auto"`` for the plate called "data", else the only outermost
            plate of the batch's rows; ``None`` for a model without rows.
        num_data: Rows of the whole data set; by default those that ``fit`` gets. ``"growing"`` for the rows seen so far: those
            given to ``fit``, and to each ``partial_fit`` after it.
        effective_num_data: In place of ``num_data``, for data that drift: how many recent rows the globals should know.
        compile: Whether programs are recorded and compiled: ``True``, ``False``, or ``"auto"`` where it repays; ``fit`` says more.

    Attributes:
        model: The model, as given.
        guide: The guide.
        objective: The objective.
        result: The last fit's :class:`~pyro_aevb.training.loop.FitResult`, ``None`` before.

    Raises:
        SettingError: If a setting is not allowed.

    Example:
        >>> from pyro_aevb import AEVB
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> class Guide(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = torch.nn.Linear(1, 2)
        ...     def forward(self, x):
        ...         loc, log_scale = self.encoder(x[..., None]).unbind(-1)
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(loc, log_scale.exp()))
        >>> vi = AEVB(model, Guide())
        >>> result = vi.fit(torch.randn(500), num_epochs=40, learning_rate=0.02, seed=0, progress=False)
        >>> z = vi.posterior(torch.tensor([-1.0, 1.0]), num_samples=2000, seed=0)["z"]
        >>> z.shape, bool((z.mean(0) - torch.tensor([-0.5, 0.5])).abs().max() < 0.2)
        (torch.Size([2000, 2]), True)
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram | None = None,
        objective: ELBO | None = None,
        *,
        data_plate: str | None = "auto",
        num_data: NumData = None,
        effective_num_data: int | None = None,
        compile: Compile = "auto",  # noqa: A002  torch's own word
    ) -> None:
        guide = AutoAmortizedNormal(model, data_plate=data_plate) if guide is None else guide
        check_compile(compile)
        objective = objective if objective is not None else SGVB(data_plate=data_plate)
        if isinstance(objective, Objective):
            objective = objective.with_data_plate(data_plate)
            data_plate = objective.data_plate
        self.model = model
        self.guide = guide
        self.objective = objective
        self.data_plate = data_plate
        self.num_data = check_num_data(num_data, effective_num_data)
        self.compile = compile
        self.result: FitResult | None = None
        self._module = ObjectiveModule(model, guide, objective, num_data=self.num_data, data_plate=data_plate)
        self._stepper: Stepper | None = None
        self._template: Batch | None = None
        self._batch_shapes: list[list[Any]] | None = None

    @property
    def module(self) -> ObjectiveModule:
        """Model, guide and objective as one ``nn.Module`` that holds every parameter; its call is the loss."""
        return self._module

    def fit(self, data: Any, **settings: Any) -> FitResult:
        """Fit model and guide to data: :func:`pyro_aevb.training.loop.fit_module` lists the settings and errors.

        Args:
            data: A tensor, a tuple, list or mapping of tensors with rows on axis 0, a Dataset, a DataLoader, or batches' iterator.
            **settings: ``num_epochs``, ``batch_size``, ``optimizer``, ``learning_rate``, ``schedule``, ``clip_norm``,
                ``validation``, ``patience``, ``seed``, ``fabric``, ``compile``, ``max_skipped``, ``callbacks``, ``checkpoint``,
                ``every``, ``keep``, ``resume``, ``logger``, ``progress``.

        Returns:
            The history, in nats per row.

        Raises:
            SettingError: If a setting is unknown or out of range.
        """
        check_settings(settings, fit_module)
        self._module.set_num_data(self.num_data)
        try:
            self.result = fit_module(self._module, data, **{"compile": self.compile, **settings})
        finally:  # a fit that failed leaves the last good state, to be saved too
            if (example := self._module.example) is not None and self._module.structure is not None:
                self._keep_template(Batch(example[0], dict(example[1])))
        return self.result

    def partial_fit(
        self, *batch: Any, learning_rate: float = 1e-3, seed: int | None = None, **covariates: Any
    ) -> float:
        """Take one step of fused Adam on a batch; the optimizer's state is kept between calls.

        Args:
            *batch: Rows, as positional arguments of the model.
            learning_rate: Of the first call; later calls keep it.
            seed: Seed of the noise; the generators are left as they were.
            **covariates: The batch's keyword arguments.

        Returns:
            The bound in nats per row; NaN if the step was skipped because loss or gradient was not finite.

        Raises:
            NonFiniteError: If too many steps in a row were skipped.
            DataError: If there are no rows, tensors differ in their number, or rows are outside a site's support, or NaN (which
                compiled steps skip).
            SettingError: If the model has globals and nothing says how many rows there are: ``num_data`` or
                ``effective_num_data`` of :class:`AEVB`.
        """
        check_covariates(covariates, AEVB.partial_fit)
        check_positive("learning_rate", learning_rate)
        rows = self._rows(batch, covariates)
        if self._plate is not None:
            check_batch(rows)
        with seeded(seed):
            if self._stepper is None:
                self._stepper = self._start(rows, learning_rate)
            with self._module.counting(rows.rows):
                return self._stepper.step(rows)

    def _start(self, rows: Batch, learning_rate: float) -> Stepper:
        """Make the parameters and an optimizer for single steps."""
        build(self._module, rows)
        check_size(self._module, None)
        self._keep_template(rows)
        staging = Staging(compile=self.compile, renews=True)
        return Stepper(self._module, default_optimizer(learning_rate), staging=staging)

    def posterior(self, *batch: Any, num_samples: int = 1000, **settings: Any) -> Values:
        """Draw the latents of rows, seen in training or not: :func:`pyro_aevb.prediction.posterior`.

        Returns:
            ``{site: [num_samples, rows, ...]}``, globals ``[num_samples, ...]``.
        """
        return self._call(posterior, batch, settings, num_samples=num_samples)

    def predict(self, *batch: Any, num_samples: int = 100, **settings: Any) -> Values:
        """Draw new observations from the posterior predictive of rows: :func:`pyro_aevb.prediction.predict`.

        Returns:
            ``{observed site: [num_samples, rows, ...]}``.
        """
        return self._call(predict, batch, settings, num_samples=num_samples)

    def reconstruct(self, *batch: Any, **settings: Any) -> Values:
        """Return E[x | z = median of q(z | x)]: :func:`pyro_aevb.prediction.reconstruct`.

        Returns:
            ``{observed site: [rows, ...]}``.
        """
        return self._call(reconstruct, batch, settings)

    def embed(self, *batch: Any, **settings: Any) -> Values:
        """Return the guide's median of each latent: :func:`pyro_aevb.prediction.embed`.

        Returns:
            ``{site: [rows, ...]}``, globals ``[...]``.
        """
        return self._call(embed, batch, settings)

    def impute(self, *batch: Any, observed: Any = None, num_samples: int = 100, **settings: Any) -> Imputation:
        """Draw missing entries of rows from p(x_missing | x_observed): :func:`pyro_aevb.impute`.

        Args:
            *batch: Rows; missing entries may hold anything, but must be finite before the first fit.
            observed: Boolean, True where an entry is known; by default what the model's own masks leave.
            num_samples: Draws.
            **settings: Of :func:`pyro_aevb.impute`, and the batch's keyword arguments.
        """
        return self._call(impute, batch, settings, observed=observed, num_samples=num_samples)

    def log_marginal(self, *batch: Any, method: str = "importance", **settings: Any) -> LogMarginal:
        """Estimate log p(x) of each row with a standard error: :func:`pyro_aevb.log_marginal`.

        Args:
            *batch: Rows to weigh.
            method: Name of the estimator.
            **settings: Of :func:`pyro_aevb.log_marginal` and of the estimator, and the batch's keyword arguments.

        Raises:
            SettingError: If ``data_plate`` is among the settings: it is the wrapper's own.
        """
        if "data_plate" in settings:
            raise SettingError(
                f"log_marginal of an AEVB takes the rows of its own data_plate={self._plate!r}, got "
                f"data_plate={settings['data_plate']!r}. Call the function instead: pyro_aevb.log_marginal(vi.model, vi.guide, "
                f"..., data_plate={settings['data_plate']!r})."
            )
        own = [setting.name for setting in fields(find_method(method))]
        return self._call(log_marginal, batch, {"compile": self.compile, **settings}, also=own, method=method)

    def compare(self, *batch: Any, against: str = "hmc", **settings: Any) -> TrustReport:
        """Hold the guide against MCMC, log p(x) and the model's own data: :func:`pyro_aevb.trust_report`.

        Args:
            *batch: Some rows; tens or hundreds will do.
            against: ``"hmc"`` or ``"nuts"``.
            **settings: Of :func:`pyro_aevb.trust_report`, and the batch's keyword arguments.
        """
        if against == "hmc":
            settings = {**settings, "sampling": {"compile": self.compile, **(settings.get("sampling") or {})}}
        return self._call(trust_report, batch, settings, against=against)

    def simulate(
        self, *template: Any, num_rows: int | None = None, seed: int | None = None, **covariates: Any
    ) -> Values:
        """Draw latents and observations from the model: :func:`pyro_aevb.prediction.simulate`.

        Args:
            *template: A batch whose shapes and covariates are used; by default the first batch of the last fit.
            num_rows: Rows to draw; the template's rows are recycled.
            seed: Seed of the draws; the generators are left as they were.
            **covariates: The template's keyword arguments.

        Raises:
            SettingError: If there is no template.
        """
        check_covariates(covariates, AEVB.simulate)
        if not template and not covariates:
            if self._template is None:
                raise SettingError("simulate needs a batch as template, for its shapes and covariates; or fit first.")
            template, covariates = self._template.args, self._template.kwargs
        rows = self._rows(template, covariates)
        with self._running(rows):
            return simulate(self.model, *rows.args, num_rows=num_rows, data_plate=self._plate, seed=seed, **rows.kwargs)

    def to(self, device: torch.device | str) -> "AEVB":
        """Move every parameter and buffer to a device; an optimizer's state is dropped.

        Raises:
            SettingError: If this machine has no such device.
        """
        self._module.to(check_device(device))
        self._stepper = None
        return self

    def save(self, path: str | Path) -> None:
        """Write parameters, buffers and the model's fingerprint to one safetensors file, atomically and without pickle.

        Raises:
            FileError: If the file can't be written; an old file is left as it was.
        """
        write_file(path, describe_program(self._module, self._batch_shapes))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PyroProgram,
        *,
        guide: PyroProgram | None = None,
        objective: ELBO | None = None,
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
    ) -> "AEVB":
        """Read a saved file into a model and guide of the kind it was saved with; data are not needed.

        Args:
            path: The file, a saved one or a checkpoint of a fit.
            model: The model; its parameters are overwritten.
            guide: The guide; its parameters are overwritten. By default the automatic guide that was saved.
            objective: The objective; by default the saved one, with a schedule replaced by its constant default.
            encoder: Encoders of the saved automatic guide, if it was given any; their parameters are overwritten.

        Raises:
            FileError: If the file is damaged, of another version, or belongs to another model.
        """
        contents = read_file(path)
        header = contents.header
        if "guide" not in header:
            raise FileError(
                f"{path} holds no program of AEVB: MonteCarloEM.fit continues its checkpoints with resume=True."
            )
        guide = read_guide(header["guide"], model, guide, encoder)
        if objective is None and header["objective"] is not None:
            name, settings = header["objective"]
            objective = rebuild_objective(name, settings, path)
        num_data: NumData = "growing" if header.get("is_growing") else header["num_data"]
        loaded = cls(model, guide, objective, data_plate=header["data_plate"], num_data=num_data)
        loaded._batch_shapes = header["batch"]
        restore(loaded._module, contents, path)
        return loaded

    def __repr__(self) -> str:
        """Tell what was read from the model, once it has run on a batch."""
        structure = self._module.structure
        lines = [f"AEVB(objective={self.objective!r})"]
        if structure is None:
            return lines[0] + "\n  not run on a batch yet: fit, or call a method with one"
        lines += ["  " + line for line in str(structure).splitlines()]
        count = sum(parameter.numel() for parameter in self._module.parameters())
        lines.append(f"  {count:,} parameters, num_data={self._module.num_data}")
        if self.result is not None:
            lines.append(f"  {self.result!r}")
        return "\n".join(lines)

    @property
    def _plate(self) -> str | None:
        """The data plate: as it was read from the model, else as it was given."""
        return self._module.structure.data_plate if self._module.structure else self.data_plate

    def _keep_template(self, batch: Batch) -> None:
        self._batch_shapes = describe(batch)
        args, kwargs = batch
        self._template = Batch(tuple(item.clone() for item in args), {n: item.clone() for n, item in kwargs.items()})

    def _rows(self, batch: tuple[Any, ...], covariates: dict[str, Any]) -> Batch:
        """Accept numpy arrays and put tensors on the parameters' device."""
        args, kwargs = as_batch(batch).args, as_batch(covariates).kwargs
        device = next((parameter.device for parameter in self._module.program.parameters()), torch.device("cpu"))
        return Batch(tuple(item.to(device) for item in args), {name: item.to(device) for name, item in kwargs.items()})

    def _running(self, rows: Batch) -> Any:
        """Run model and guide with this wrapper's parameters, made on first use."""
        if not self._module.program.is_built:
            self._module.build(*rows.args, **rows.kwargs)
            self._batch_shapes = describe(rows)
        return self._module.program.running()

    def _call(
        self,
        function: Any,
        batch: tuple[Any, ...],
        settings: dict[str, Any],
        *,
        also: Collection[str] = (),
        **fixed: Any,
    ) -> Any:
        """Call a public function, which passes on settings called ``also``, with this wrapper's own parts and parameters."""
        covariates = {name: item for name, item in settings.items() if isinstance(item, (Tensor, np.ndarray))}
        options = {name: item for name, item in settings.items() if name not in covariates}
        if "data_plate" in options:
            raise SettingError(
                f"data_plate belongs to the whole wrapper: AEVB(model, guide, data_plate={options['data_plate']!r})."
            )
        check_settings(options, function, also=also)
        rows = self._rows(batch, covariates)
        with self._running(rows):
            return function(
                self.model, self.guide, *rows.args, data_plate=self._plate, **fixed, **options, **rows.kwargs
            )
