"""Auto-Encoding Variational Bayes (Kingma & Welling, arXiv 1312.6114) for any Pyro model with continuous latents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_aevb.aevb import AEVB
    from pyro_aevb.diagnostics.calibration import Calibration, calibrate
    from pyro_aevb.diagnostics.collapse import CollapseMonitor, collapse_report
    from pyro_aevb.diagnostics.collapse_result import CollapseReport
    from pyro_aevb.diagnostics.comparison import compare_posteriors
    from pyro_aevb.diagnostics.comparison_result import Comparison
    from pyro_aevb.diagnostics.gap import InferenceGap, inference_gap
    from pyro_aevb.diagnostics.gradients import GradientReport, gradient_report
    from pyro_aevb.diagnostics.predictive import predictive_check
    from pyro_aevb.diagnostics.predictive_result import PredictiveCheck
    from pyro_aevb.diagnostics.report import TrustReport, trust_report
    from pyro_aevb.distributions.dirichlet import Beta, Dirichlet
    from pyro_aevb.distributions.erlang import Erlang
    from pyro_aevb.distributions.gompertz import Gompertz
    from pyro_aevb.distributions.logistic import Logistic
    from pyro_aevb.distributions.rayleigh import Rayleigh
    from pyro_aevb.distributions.reciprocal import Reciprocal
    from pyro_aevb.distributions.triangular import Triangular
    from pyro_aevb.distributions.uniform import Uniform
    from pyro_aevb.distributions.wrapped_normal import WrappedNormal
    from pyro_aevb.evidence.bdmc import BDMCResult, bdmc
    from pyro_aevb.evidence.marginal import log_marginal
    from pyro_aevb.evidence.result import LogMarginal
    from pyro_aevb.export import export_posterior, to_arviz
    from pyro_aevb.guides.encoders import ConvEncoder, MLPEncoder, SequenceEncoder, SetEncoder
    from pyro_aevb.guides.flow import AutoAmortizedFlow
    from pyro_aevb.guides.normal import AutoAmortizedMultivariateNormal, AutoAmortizedNormal
    from pyro_aevb.imputation.impute import impute
    from pyro_aevb.imputation.result import Imputation
    from pyro_aevb.mcmc.draws import PosteriorDraws
    from pyro_aevb.mcmc.nuts import nuts_posterior
    from pyro_aevb.mcmc.posterior import hmc_posterior
    from pyro_aevb.objectives.importance_weighted import IWELBO
    from pyro_aevb.objectives.sgvb import SGVB
    from pyro_aevb.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep
    from pyro_aevb.prediction import embed, posterior, predict, reconstruct, simulate
    from pyro_aevb.program.density import LogDensity
    from pyro_aevb.program.staging import stage
    from pyro_aevb.training.em import EMResult, MonteCarloEM
    from pyro_aevb.training.loop import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "AEVB",
    "IWELBO",
    "SGVB",
    "AutoAmortizedFlow",
    "AutoAmortizedMultivariateNormal",
    "AutoAmortizedNormal",
    "BDMCResult",
    "Beta",
    "Calibration",
    "CollapseMonitor",
    "CollapseReport",
    "Comparison",
    "ConvEncoder",
    "Dirichlet",
    "EMResult",
    "Erlang",
    "FitResult",
    "Gompertz",
    "GradientReport",
    "Imputation",
    "InferenceGap",
    "LogDensity",
    "LogMarginal",
    "Logistic",
    "MLPEncoder",
    "MonteCarloEM",
    "PosteriorDraws",
    "PredictiveCheck",
    "Rayleigh",
    "Reciprocal",
    "ReweightedWakeSleep",
    "SequenceEncoder",
    "SetEncoder",
    "Triangular",
    "TrustReport",
    "Uniform",
    "WakeSleep",
    "WrappedNormal",
    "bdmc",
    "calibrate",
    "collapse_report",
    "compare_posteriors",
    "embed",
    "export_posterior",
    "fit",
    "gradient_report",
    "hmc_posterior",
    "impute",
    "inference_gap",
    "log_marginal",
    "nuts_posterior",
    "posterior",
    "predict",
    "predictive_check",
    "reconstruct",
    "simulate",
    "stage",
    "to_arviz",
    "trust_report",
]

# Names are looked up when they are first used (PEP 562), so that `python -m pyro_aevb --help` need not wait for torch.
_HOMES = {
    "AEVB": "aevb",
    "IWELBO": "objectives.importance_weighted",
    "SGVB": "objectives.sgvb",
    "AutoAmortizedFlow": "guides.flow",
    "AutoAmortizedMultivariateNormal": "guides.normal",
    "AutoAmortizedNormal": "guides.normal",
    "BDMCResult": "evidence.bdmc",
    "Beta": "distributions.dirichlet",
    "Calibration": "diagnostics.calibration",
    "CollapseMonitor": "diagnostics.collapse",
    "CollapseReport": "diagnostics.collapse_result",
    "Comparison": "diagnostics.comparison_result",
    "ConvEncoder": "guides.encoders",
    "Dirichlet": "distributions.dirichlet",
    "EMResult": "training.em",
    "Erlang": "distributions.erlang",
    "FitResult": "training.loop",
    "Gompertz": "distributions.gompertz",
    "GradientReport": "diagnostics.gradients",
    "Imputation": "imputation.result",
    "InferenceGap": "diagnostics.gap",
    "LogDensity": "program.density",
    "LogMarginal": "evidence.result",
    "Logistic": "distributions.logistic",
    "MLPEncoder": "guides.encoders",
    "MonteCarloEM": "training.em",
    "PosteriorDraws": "mcmc.draws",
    "PredictiveCheck": "diagnostics.predictive_result",
    "Rayleigh": "distributions.rayleigh",
    "Reciprocal": "distributions.reciprocal",
    "ReweightedWakeSleep": "objectives.wake_sleep",
    "SequenceEncoder": "guides.encoders",
    "SetEncoder": "guides.encoders",
    "Triangular": "distributions.triangular",
    "TrustReport": "diagnostics.report",
    "Uniform": "distributions.uniform",
    "WakeSleep": "objectives.wake_sleep",
    "WrappedNormal": "distributions.wrapped_normal",
    "bdmc": "evidence.bdmc",
    "calibrate": "diagnostics.calibration",
    "collapse_report": "diagnostics.collapse",
    "compare_posteriors": "diagnostics.comparison",
    "embed": "prediction",
    "export_posterior": "export",
    "fit": "training.loop",
    "gradient_report": "diagnostics.gradients",
    "hmc_posterior": "mcmc.posterior",
    "impute": "imputation.impute",
    "inference_gap": "diagnostics.gap",
    "log_marginal": "evidence.marginal",
    "nuts_posterior": "mcmc.nuts",
    "posterior": "prediction",
    "predict": "prediction",
    "predictive_check": "diagnostics.predictive",
    "reconstruct": "prediction",
    "simulate": "prediction",
    "stage": "program.staging",
    "to_arviz": "export",
    "trust_report": "diagnostics.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
