"""Auto-Encoding Variational Bayes (Kingma & Welling, arXiv 1312.6114) for any Pyro model with continuous latents."""

from pyro_aevb.aevb import AEVB
from pyro_aevb.evidence.importance import log_marginal
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.objectives.importance_weighted import IWELBO
from pyro_aevb.objectives.sgvb import SGVB
from pyro_aevb.prediction import embed, posterior, predict, reconstruct, simulate
from pyro_aevb.program.staging import stage
from pyro_aevb.training.loop import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "AEVB",
    "IWELBO",
    "SGVB",
    "FitResult",
    "LogMarginal",
    "embed",
    "fit",
    "log_marginal",
    "posterior",
    "predict",
    "reconstruct",
    "simulate",
    "stage",
]
