"""Every model class that an automatic guide must serve, with data and posterior moments to hold it to."""

from model_classes.base import ModelClass
from model_classes.conditional import CONDITIONAL
from model_classes.dependent import DEPENDENT
from model_classes.globals_ import GLOBALS
from model_classes.missing import MISSING
from model_classes.nested import NESTED
from model_classes.semi_supervised import SEMI_SUPERVISED
from model_classes.series import SERIES
from model_classes.vectors import IMAGES, VECTORS

CLASSES = {
    1: "one vector latent per row, any likelihood",
    2: "several latents per row, dependent, of every support",
    3: "nested plates",
    4: "globals and locals, parameters",
    5: "time series",
    6: "covariates",
    7: "partly observed data",
    8: "semi-supervised",
    9: "images",
}

ENTRIES = (
    *VECTORS,
    *DEPENDENT,
    *NESTED,
    *GLOBALS,
    *SERIES,
    *CONDITIONAL,
    *MISSING,
    *SEMI_SUPERVISED,
    *IMAGES,
)

REGISTRY: dict[str, ModelClass] = {entry.name: entry for entry in ENTRIES}
"""Entries by name."""
