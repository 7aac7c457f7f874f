"""Sample sites of a trace, and values given to them."""

from typing import Any, TypeAlias

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.trace_struct import Trace

from pyro_aevb._types import Values

__all__ = ["Nodes", "ReplayValues", "SharedIndices", "SpentNoise", "sample_sites"]

Nodes: TypeAlias = dict[str, Any]
"""Sample sites of a trace by name."""


class ReplayValues(Messenger):
    """Give latent sites the values of a dictionary; sites that it lacks are sampled."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Message) -> None:
        if message["name"] in self.values and not message["is_observed"]:
            message["value"] = self.values[message["name"]]
            message["done"] = True


class SharedIndices(Messenger):
    """Let every run inside see the rows that the first one drew, where plates subsample.

    Attributes:
        indices: Drawn indices by plate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.indices: Values = {}

    def _pyro_sample(self, message: Message) -> None:
        if _draws_indices(message) and message["name"] in self.indices:
            message["value"] = self.indices[message["name"]]
            message["done"] = True

    def _pyro_post_sample(self, message: Message) -> None:
        name, index = message["name"], message["value"]
        if _draws_indices(message) and name is not None and index is not None:
            self.indices[name] = index


class SpentNoise(Messenger):
    """Draw what replayed sites would have drawn and drop it, so that other noise, of dropout, comes out as it did."""

    def _pyro_post_sample(self, message: Message) -> None:
        if not message["is_observed"]:
            with torch.no_grad():
                message["fn"]()


def _draws_indices(message: Message) -> bool:
    """Tell whether a message is a plate's choice of some of its indices."""
    fn: Any = message["fn"]
    return type(fn).__name__ == "_Subsample" and fn.subsample_size is not None and fn.subsample_size < fn.size


def sample_sites(trace: Trace) -> Nodes:
    """Return a trace's sample sites that have a density: no subsampling, no ``pyro.deterministic``."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and type(node["fn"]).__name__ != "_Subsample"
        and not (node["infer"] or {}).get("_deterministic", False)
    }
