"""Every model class that an automatic guide must serve, with data and posterior moments to hold it to."""

from model_classes.base import ModelClass
from model_classes.dependent import DEPENDENT
from model_classes.nested import NESTED
from model_classes.vectors import IMAGES, VECTORS

CLASSES = {
    1: "one vector latent per row, any likelihood",
    2: "several latents per row, dependent, of every support",
    3: "nested plates",
    9: "images",
}

REGISTRY: dict[str, ModelClass] = {entry.name: entry for entry in (*VECTORS, *DEPENDENT, *NESTED, *IMAGES)}
