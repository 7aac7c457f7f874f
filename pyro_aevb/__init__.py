"""Auto-Encoding Variational Bayes (Kingma & Welling, arXiv 1312.6114) for any Pyro model with continuous latents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_aevb.aevb import AEVB
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
    from pyro_aevb.guides.encoders import ConvEncoder, MLPEncoder, SequenceEncoder, SetEncoder
    from pyro_aevb.guides.flow import AutoAmortizedFlow
    from pyro_aevb.guides.normal import AutoAmortizedMultivariateNormal, AutoAmortizedNormal
    from pyro_aevb.imputation.impute import impute
    from pyro_aevb.imputation.result import Imputation
    from pyro_aevb.mcmc.draws import PosteriorDraws
    from pyro_aevb.mcmc.posterior import hmc_posterior
    from pyro_aevb.objectives.importance_weighted import IWELBO
    from pyro_aevb.objectives.sgvb import SGVB
    from pyro_aevb.prediction import embed, posterior, predict, reconstruct, simulate
    from pyro_aevb.program.density import LogDensity
    from pyro_aevb.program.staging import stage
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
    "ConvEncoder",
    "Dirichlet",
    "Erlang",
    "FitResult",
    "Gompertz",
    "Imputation",
    "LogDensity",
    "LogMarginal",
    "Logistic",
    "MLPEncoder",
    "PosteriorDraws",
    "Rayleigh",
    "Reciprocal",
    "SequenceEncoder",
    "SetEncoder",
    "Triangular",
    "Uniform",
    "WrappedNormal",
    "bdmc",
    "embed",
    "fit",
    "hmc_posterior",
    "impute",
    "log_marginal",
    "posterior",
    "predict",
    "reconstruct",
    "simulate",
    "stage",
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
    "ConvEncoder": "guides.encoders",
    "Dirichlet": "distributions.dirichlet",
    "Erlang": "distributions.erlang",
    "FitResult": "training.loop",
    "Gompertz": "distributions.gompertz",
    "Imputation": "imputation.result",
    "LogDensity": "program.density",
    "LogMarginal": "evidence.result",
    "Logistic": "distributions.logistic",
    "MLPEncoder": "guides.encoders",
    "PosteriorDraws": "mcmc.draws",
    "Rayleigh": "distributions.rayleigh",
    "Reciprocal": "distributions.reciprocal",
    "SequenceEncoder": "guides.encoders",
    "SetEncoder": "guides.encoders",
    "Triangular": "distributions.triangular",
    "Uniform": "distributions.uniform",
    "WrappedNormal": "distributions.wrapped_normal",
    "bdmc": "evidence.bdmc",
    "embed": "prediction",
    "fit": "training.loop",
    "hmc_posterior": "mcmc.posterior",
    "impute": "imputation.impute",
    "log_marginal": "evidence.marginal",
    "posterior": "prediction",
    "predict": "prediction",
    "reconstruct": "prediction",
    "simulate": "prediction",
    "stage": "program.staging",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
