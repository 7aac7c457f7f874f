"""Automatic guides as JSON values, from which they are made again without data; their tensors are saved apart."""

from collections.abc import Mapping
from typing import Any

from pyro.infer import autoguide
from torch import nn

from pyro_aevb._types import PyroProgram
from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.guides.base import AmortizedGuide
from pyro_aevb.guides.families import neural_spline_flow
from pyro_aevb.guides.flow import AutoAmortizedFlow
from pyro_aevb.guides.normal import AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.guides.record import Record

__all__ = ["describe_guide", "read_guide", "recall_guide", "restore_guide"]

_CLASSES = {kind.__name__: kind for kind in (AutoAmortizedNormal, AutoAmortizedMultivariateNormal, AutoAmortizedFlow)}


def describe_guide(guide: AmortizedGuide) -> dict[str, Any]:
    """Return class, settings and what was read off data, as JSON values.

    Modules and classes of the user's own are named only: they have to be given again.
    """
    kind = guide.global_guide
    own = [] if guide.name in _CLASSES and type(guide) is _CLASSES[guide.name] else ["class"]
    if not isinstance(kind, str) and getattr(autoguide, kind.__name__, None) is not kind:
        own.append("global_guide")
    if isinstance(guide, AutoAmortizedFlow) and guide.flow is not neural_spline_flow:
        own.append("flow")
    return {
        "class": guide.name,
        "own": own,
        "settings": {
            "data_plate": guide.data_plate,
            "init_scale": guide.init_scale,
            "global_guide": kind if isinstance(kind, str) else kind.__name__,
        },
        "encoder": _encoder_names(guide.encoder),
        "record": guide.record.to_json() if guide.is_built else None,
    }


def _encoder_names(encoder: nn.Module | Mapping[str, nn.Module] | None) -> str | list[str] | None:
    """Name a user's encoder by its class, encoders by their latents."""
    return sorted(encoder) if isinstance(encoder, Mapping) else None if encoder is None else type(encoder).__name__


def restore_guide(
    saved: Mapping[str, Any], model: PyroProgram, encoder: nn.Module | Mapping[str, nn.Module] | None = None
) -> AmortizedGuide:
    """Make a guide from its description, to be built by its first batch, whatever that holds.

    Args:
        saved: What :func:`describe_guide` returned.
        model: The model.
        encoder: The user's encoder, if the guide had one.

    Raises:
        FileError: If the guide had parts of the user's own that are not given.
    """
    name, own = saved["class"], saved["own"]
    if own:
        raise FileError(
            f"The guide {name} was saved with its own {' and '.join(own)}, which a file can't hold: give it again, "
            f"guide={name}(model, ...)."
        )
    if (saved["encoder"] is None) != (encoder is None):
        had = "none" if saved["encoder"] is None else f"{saved['encoder']}"
        raise FileError(
            f"The guide {name} was saved with encoder {had}, but {_encoder_names(encoder)} was given. A file holds an encoder's "
            f"numbers and not its code: give encoder= as to the saved guide."
        )
    kind = saved["settings"]["global_guide"]
    settings = {**saved["settings"], "global_guide": getattr(autoguide, kind, kind)}
    guide = _CLASSES[name](model, encoder=encoder, **settings)
    recall_guide(guide, saved)
    return guide


def recall_guide(guide: AmortizedGuide, saved: Mapping[str, Any]) -> None:
    """Let a guide that has yet to be built be built as the saved one was.

    Raises:
        FileError: If the guide is of another class.
    """
    if guide.name != saved["class"]:
        raise FileError(f"The file holds a guide of class {saved['class']}, but guide= is a {guide.name}.")
    if saved["record"] is not None:
        guide.recall(Record.from_json(saved["record"]))


def read_guide(
    saved: Mapping[str, Any] | None,
    model: PyroProgram,
    guide: PyroProgram | None,
    encoder: nn.Module | Mapping[str, nn.Module] | None,
) -> PyroProgram:
    """Return the guide of a saved file, made from its description unless it is given.

    Args:
        saved: The guide's description in the file; ``None`` for a guide of the user's own.
        model: The model.
        guide: The guide, if it is given.
        encoder: Encoders of a guide that is made.

    Raises:
        SettingError: If both a guide and an encoder are given.
        FileError: If there is neither a guide nor a description.
    """
    if guide is not None and encoder is not None:
        raise SettingError("encoder= belongs to the guide that the file describes; give it to guide= instead.")
    if guide is None:
        if saved is None:
            raise FileError("The file was saved with a guide of the user's own: give it again, guide=...")
        return restore_guide(saved, model, encoder)
    if saved is not None and isinstance(guide, AmortizedGuide):
        recall_guide(guide, saved)
    return guide
