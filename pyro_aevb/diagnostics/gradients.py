"""Which estimator of the gradient suits a model: bias, variance, signal-to-noise and time of each, on the user's own data."""

import html
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from pyro_aevb._types import PyroProgram
from pyro_aevb.diagnostics.gradient_draws import GradientMoments, GradientSource
from pyro_aevb.errors import GuideError, ModelError, SettingError
from pyro_aevb.objectives.base import Objective, check_choice
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.program.batch import as_tensors, batch_rows
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.rows import inferring, located
from pyro_aevb.program.settings import check_count, check_covariates

if TYPE_CHECKING:
    import pandas

__all__ = ["GradientEstimate", "GradientReport", "gradient_report"]

_REFERENCE_DRAWS = 100
"""Draws of a row behind each of the gradients that the reference is the mean of."""

_SURE = 4.0
"""Root-mean-square errors beyond which a deviation is called bias. The square of a deviation over its expected square is a mean
of squares of standard normals, which exceeds 16 with a probability of at most 6e-5."""

_CLEARLY = 0.8
"""Share of the default's cost (variance times seconds) below which another estimator is recommended in its place."""


@dataclass(frozen=True)
class GradientEstimate:
    r"""One estimator's gradient with respect to one group of parameters; norms are Euclidean over the group.

    Attributes:
        estimator: Its name.
        objective: What it is a gradient of: ``"ELBO"`` or ``"IWAE"``; the loss is minus the bound on the whole data set.
        group: The parameters.
        num_parameters: How many.
        norm: Norm of the gradient's expectation, by the reference, its noise taken out: 0 where that is all there is.
        bias: Norm of the difference between the estimator's mean and the reference.
        bias_error: Root-mean-square of ``bias`` if there is none: what Monte Carlo noise leaves. NaN, as ``bias``, where there is
            no reference.
        variance: Sum over the parameters of the variance of one gradient.
        snr: Signal-to-noise ratio, ``norm`` over the root of ``variance``; NaN where both are 0.
        seconds: Median time of one gradient.
    """

    estimator: str
    objective: str
    group: str
    num_parameters: int
    norm: float
    bias: float
    bias_error: float
    variance: float
    snr: float
    seconds: float

    @property
    def is_biased(self) -> bool:
        """Whether the bias is more than four times what noise leaves."""
        return self.bias > _SURE * self.bias_error

    @property
    def cost(self) -> float:
        """Variance times seconds: the time to an average of a given variance is proportional to it."""
        return self.variance * self.seconds


@dataclass(frozen=True, repr=False)
class GradientReport:
    """Every estimator on every group of parameters.

    Attributes:
        estimates: One entry for each pair.
        skipped: Estimators that do not apply, with the reason.
        recommendation: What to use, in words.
        num_samples: Gradients behind each variance.
        num_importance_samples: K of the importance-weighted estimators.
    """

    estimates: tuple[GradientEstimate, ...]
    skipped: dict[str, str]
    recommendation: str
    num_samples: int
    num_importance_samples: int

    def find(self, estimator: str, group: str) -> GradientEstimate:
        """Return one entry.

        Raises:
            SettingError: If there is none, with the ones there are.
        """
        for entry in self.estimates:
            if (entry.estimator, entry.group) == (estimator, group):
                return entry
        known = [(entry.estimator, entry.group) for entry in self.estimates]
        raise SettingError(f"There is no estimate of {(estimator, group)!r}; known are {known}. {self._reasons()}")

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a table with one line an entry."""
        import pandas  # 0.5 s, which only those who ask for a table pay

        return pandas.DataFrame([{**asdict(entry), "is_biased": entry.is_biased} for entry in self.estimates])

    def __repr__(self) -> str:
        table = self._table().to_string(index=False, float_format="{:.3g}".format, na_rep="-")
        return "\n".join(item for item in (self._title(), table, self._reasons(), self.recommendation) if item)

    def _repr_html_(self) -> str:
        table = self._table().to_html(index=False, float_format="{:.3g}".format, na_rep="-")
        notes = "<br>".join(map(html.escape, f"{self._reasons()}\n{self.recommendation}".strip().splitlines()))
        return f"<p>{html.escape(self._title())}</p>{table}<p>{notes}</p>"

    def _title(self) -> str:
        return (
            f"GradientReport of the loss, nats over the whole data set: {self.num_samples} gradients each; K = "
            f"{self.num_importance_samples} in IWAE and DReG"
        )

    def _table(self) -> "pandas.DataFrame":
        """Return the table that people read."""
        return self.to_pandas().drop(columns=["num_parameters", "is_biased"])

    def _reasons(self) -> str:
        """List what does not apply."""
        return "\n".join(f"{name} does not apply: {reason}" for name, reason in self.skipped.items())


def gradient_report(
    model: PyroProgram,
    guide: PyroProgram,
    *batch: Any,
    num_samples: int = 200,
    num_reference: int = 100,
    num_particles: int = 1,
    num_importance_samples: int = 5,
    groups: str = "program",
    num_data: int | None = None,
    data_plate: str | None = "auto",
    seed: int | None = None,
    progress: bool = True,
    **covariates: Any,
) -> GradientReport:
    r"""Measure each estimator of the gradient on a batch: bias, variance, signal-to-noise ratio and time.

    =========  =======================================================================================  =========
    name       estimator                                                                                objective
    =========  =======================================================================================  =========
    ``A``      ``SGVB(kl="sampled")``, arXiv 1312.6114, Eq 6                                            ELBO
    ``B``      ``SGVB()``: the KL in closed form at every site where that is valid, Eq 7                ELBO
    ``STL``    ``SGVB(gradient="stl")``, without the score of q (Roeder et al. 2017, arXiv 1703.09194)  ELBO
    ``score``  ``SGVB(gradient="score")``, which the paper rejects for its variance (section 2.2)       ELBO
    ``IWAE``   ``IWELBO(K)``, the total derivative (Burda et al. 2015, arXiv 1509.00519)                IWAE
    ``DReG``   ``IWELBO(K, gradient="dreg")`` (Tucker et al. 2018, arXiv 1810.04152)                    IWAE
    =========  =======================================================================================  =========

    Bias is held against the estimator's own objective: the reference is the mean of ``num_reference`` reparameterized gradients
    (A, or IWAE), each of 100 draws a row. Where the guide is not reparameterized there is no reference, and bias is NaN. With
    the gradients of one batch nothing is said about the noise of choosing the batch.

    Modules run in eval mode, and nothing is trained. Costs ``num_samples`` gradients of each estimator, and the references.

    Args:
        model: The model.
        guide: The guide, as it is to be trained further.
        *batch: A minibatch, as positional arguments of the model.
        num_samples: Gradients of each estimator, at least 2.
        num_reference: Gradients behind each reference, at least 2.
        num_particles: L, draws averaged in a gradient, of every estimator.
        num_importance_samples: K of ``IWAE`` and ``DReG``.
        groups: ``"program"``: the parameters of the guide, of the model, and of both. ``"module"``: also those of each module by
            itself.
        num_data: Rows of the whole data set, if the batch is a part of it and the model has globals.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None``.
        seed: Seed of the draws; the generators are left as they were.
        progress: Whether to show a progress bar.
        **covariates: The batch's keyword arguments.

    Returns:
        The table, with the estimators that do not apply and a recommendation. It weighs variance times seconds of the guide's
        gradient, since the estimators treat the model's alike.

    Raises:
        SettingError: If a setting is unknown or out of range.
        ParameterError: If neither program has a parameter.
        ModelError: If the model is not supported.
        GuideError: If the guide does not fit the model.
        NonFiniteError: If a gradient is NaN or infinite.

    Example:
        >>> from pyro_aevb.testing import LinearGaussian
        >>> exact, x = LinearGaussian.fixture()
        >>> guide = exact.mean_field_guide(at_optimum=True)
        >>> report = gradient_report(exact.model, guide, x, num_samples=50, num_reference=10, seed=0, progress=False)
        >>> report.find("score", "guide").variance > 10 * report.find("A", "guide").variance
        True
    """
    check_choice("groups", groups, ("program", "module"))
    check_covariates(covariates, gradient_report)
    batch, covariates = as_tensors(batch, covariates)
    _check_counts(num_samples, num_reference, num_data, batch_rows(batch, covariates) or 0)
    estimators = _make_estimators(num_particles, num_importance_samples, data_plate)
    with inferring(seed, model, guide), located(batch, covariates):
        module = ObjectiveModule(model, guide, estimators["A"], num_data=num_data, data_plate=data_plate)
        source = GradientSource(module, batch, covariates)
        skipped = _find_skipped(source, estimators)
        used = {name: item for name, item in estimators.items() if name not in skipped}
        references = {
            name: item for name, item in _make_references(num_importance_samples, data_plate).items() if name in used
        }
        total = num_samples * len(used) + num_reference * len(references)
        with tqdm(total=total, disable=not progress, unit="gradient", dynamic_ncols=True) as bar:
            exact = {
                _OBJECTIVES[name]: source.draw(item, num_reference, bar.update) for name, item in references.items()
            }
            moments = {name: source.draw(item, num_samples, bar.update) for name, item in used.items()}
    places = source.groups(by_module=groups == "module")
    estimates = tuple(
        _summarize(name, group, at, drawn, exact.get(_OBJECTIVES[name]))
        for name, drawn in moments.items()
        for group, at in places.items()
    )
    recommendation = _recommend(estimates, num_importance_samples)
    return GradientReport(estimates, skipped, recommendation, num_samples, num_importance_samples)


def _check_counts(num_samples: int, num_reference: int, num_data: int | None, rows: int) -> None:
    """Refuse too few gradients, and a data set of fewer rows than its batch."""
    for name, count in (("num_samples", num_samples), ("num_reference", num_reference)):
        check_count(name, count)
        if count < 2:
            raise SettingError(f"{name} must be at least 2, or there is no variance; got {count}.")
    check_count("num_data", num_data, is_optional=True)
    if num_data is not None and num_data < rows:
        raise SettingError(
            f"num_data is the number of rows of the whole data set, at least the batch's {rows}; got {num_data}."
        )


_OBJECTIVES = {"A": "ELBO", "B": "ELBO", "STL": "ELBO", "score": "ELBO", "IWAE": "IWAE", "DReG": "IWAE"}
"""What each estimator is a gradient of."""


def _make_estimators(num_particles: int, num_importance_samples: int, data_plate: str | None) -> dict[str, Objective]:
    """Make every estimator."""
    return {
        "A": SGVB(num_particles, kl="sampled", data_plate=data_plate),
        "B": SGVB(num_particles, data_plate=data_plate),
        "STL": SGVB(num_particles, gradient="stl", data_plate=data_plate),
        "score": SGVB(num_particles, gradient="score", data_plate=data_plate),
        "IWAE": IWELBO(num_importance_samples, num_particles, data_plate=data_plate),
        "DReG": IWELBO(num_importance_samples, num_particles, gradient="dreg", data_plate=data_plate),
    }


def _make_references(num_importance_samples: int, data_plate: str | None) -> dict[str, Objective]:
    """Make the reparameterized estimators, of many draws each."""
    num_particles = max(1, _REFERENCE_DRAWS // num_importance_samples)
    return {
        "A": SGVB(_REFERENCE_DRAWS, kl="sampled", data_plate=data_plate),
        "IWAE": IWELBO(num_importance_samples, num_particles, data_plate=data_plate),
    }


def _find_skipped(source: GradientSource, estimators: dict[str, Objective]) -> dict[str, str]:
    """Say which estimators do not apply to this pair, and why."""
    skipped = {}
    for name, objective in estimators.items():
        try:
            source.prepare(objective)
        except (GuideError, ModelError, SettingError) as error:
            skipped[name] = str(error)
    closed = estimators["B"]
    if "B" not in skipped and isinstance(closed, SGVB):
        plan = source.explain(closed)
        if all(choice.estimator == "A" for choice in plan.values()):
            reasons = "; ".join(f"{site}: {choice.reason}" for site, choice in plan.items())
            skipped["B"] = f"a closed-form KL is valid at no site ({reasons})."
    return skipped


def _summarize(
    name: str, group: str, places: Int[Tensor, " parameters"], drawn: GradientMoments, exact: GradientMoments | None
) -> GradientEstimate:
    """Sum one estimator's moments over a group of parameters."""
    truth = drawn if exact is None else exact
    noise = truth.squared_error[places].sum().item()
    norm = math.sqrt(max(0.0, truth.mean[places].square().sum().item() - noise))
    variance = drawn.variance[places].sum().item()
    bias = bias_error = math.nan
    if exact is not None:
        bias = (drawn.mean - exact.mean)[places].norm().item()
        bias_error = math.sqrt(noise + drawn.squared_error[places].sum().item())
    snr = norm / math.sqrt(variance) if variance > 0 else math.inf if norm > 0 else math.nan
    return GradientEstimate(
        name, _OBJECTIVES[name], group, len(places), norm, bias, bias_error, variance, snr, drawn.seconds
    )


def _recommend(estimates: tuple[GradientEstimate, ...], num_importance_samples: int) -> str:
    """Say in words what to use for each objective, and what the numbers show."""
    groups = {entry.group for entry in estimates}
    group = next(name for name in ("guide", "guide and model", "model") if name in groups)
    entries = {entry.estimator: entry for entry in estimates if entry.group == group}
    sentences = [
        f"{entry.estimator} is biased here for the {entry.group}'s parameters: {entry.bias:.3g}, where noise leaves "
        f"{entry.bias_error:.3g}. Do not use it."
        for entry in estimates
        if entry.is_biased
    ]
    for objective, what in (
        ("ELBO", "the ELBO"),
        ("IWAE", f"the importance-weighted bound, K = {num_importance_samples}"),
    ):
        sound = [entry for entry in entries.values() if entry.objective == objective and not entry.is_biased]
        sentences += [f"For {what}: {_choose(sound)}"] if sound else []
    if "A" in entries and "score" in entries and entries["A"].variance > 0:
        ratio = entries["score"].variance / entries["A"].variance
        sentences.append(
            f"The score function's gradient of the {group}'s parameters has {ratio:.3g} times the variance of A, the "
            f"reparameterized one (section 2.2 of the paper)."
        )
    if all(entry.norm == 0.0 for entry in entries.values()):
        sentences.append(
            f"The expected gradient of the {group}'s parameters can't be told from 0: they are near an optimum, so go by the "
            f"variance."
        )
    return "\n".join(sentences)


def _choose(sound: list[GradientEstimate]) -> str:
    """Pick the cheapest estimator of one objective, or the default where none is clearly cheaper."""
    names = {entry.estimator: entry for entry in sound}
    default = next((names[name] for name in ("B", "A", "IWAE") if name in names), sound[0])
    best = min(sound, key=lambda entry: entry.cost)
    if best is default or best.cost > _CLEARLY * default.cost:
        others = ", no other is clearly better" if len(sound) > 1 else ", the only one that applies"
        return f"{_CALLS[default.estimator]} ({default.estimator}){others}."
    ratio = best.variance / default.variance
    return (
        f"{_CALLS[best.estimator]} ({best.estimator}): its gradient of the {best.group}'s parameters has {ratio:.3g} times the "
        f"variance of {default.estimator}, in {best.seconds / default.seconds:.2g} times the time."
    )


_CALLS = {
    "A": "SGVB(kl='sampled')",
    "B": "SGVB()",
    "STL": "SGVB(gradient='stl')",
    "score": "SGVB(gradient='score')",
    "IWAE": "IWELBO(...)",
    "DReG": "IWELBO(..., gradient='dreg')",
}
"""How each is made."""
