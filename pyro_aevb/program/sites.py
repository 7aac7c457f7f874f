"""Sample sites of a trace, and values given to them."""

from typing import Any, TypeAlias

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.trace_struct import Trace

from pyro_aevb._types import Values

__all__ = ["Nodes", "ReplayValues", "sample_sites"]

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


def sample_sites(trace: Trace) -> Nodes:
    """Return a trace's sample sites that have a density: no subsampling, no ``pyro.deterministic``."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and type(node["fn"]).__name__ != "_Subsample"
        and not (node["infer"] or {}).get("_deterministic", False)
    }
