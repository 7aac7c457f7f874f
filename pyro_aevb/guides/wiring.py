"""What each local latent's encoder must see: a faithful inverse of the model's graph.

A guide draws a row's latents one after another, so that q(z_1, ..., z_n | x) = prod_i q(z_i | z_<i, x). Factor i needs no more
than the smallest part S of z_<i and x that screens it off from the rest, p(z_i | z_<i, x) = p(z_i | S): with fewer inputs it
cannot be the posterior, with more it only has more to learn (Webb et al. 2018, arXiv 1712.00287).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

__all__ = ["Node", "Source", "sampling_order", "wire"]

_COPIES = (0, 1)


@dataclass(frozen=True)
class Node:
    """A site or an argument in the graph of a model.

    Attributes:
        name: Its name.
        kind: A ``factor`` opens paths as an observed site does, but has no value that could be an input.
        plates: Its vectorized plates without the data plate; of no account for globals.
        is_local: Whether it has a value for each row.
    """

    name: str
    kind: Literal["latent", "observed", "argument", "factor"]
    plates: frozenset[str]
    is_local: bool


@dataclass(frozen=True)
class Source:
    """One input of one latent's encoder.

    Attributes:
        name: The node that it is read from.
        pooled: Plates of that node over which it is pooled, or read in order. Along its other plates the latent sees its own
            instance, and the instances along plates that only the latent has all see the same.
    """

    name: str
    pooled: frozenset[str]


_Instance = tuple[str, tuple[int, ...]]
"""A node's name and its copy, 0 or 1, in each of its plates, these sorted by name."""


def sampling_order(nodes: Iterable[Node]) -> list[str]:
    """Return the latents in the order in which a guide draws them: globals, then outer plates before inner ones.

    What is drawn first leaves the later ones independent: given its group's latent, a row depends on no other row. Latents in
    equally many plates keep the model's order.

    Example:
        >>> row, group = frozenset({"rows"}), frozenset()
        >>> sampling_order([Node("z", "latent", row, True), Node("group", "latent", group, True)])
        ['group', 'z']
    """
    latents = [node for node in nodes if node.kind == "latent"]
    return [node.name for node in sorted(latents, key=lambda node: len(node.plates) + 1 if node.is_local else 0)]


def wire(
    nodes: Sequence[Node], parents: Mapping[str, frozenset[str]], *, ordered: frozenset[str] = frozenset()
) -> dict[str, tuple[Source, ...]]:
    r"""Say what the encoder of each local latent has to see.

    Let A be all that is known when z is drawn: globals, every instance of the latents before z, local observations and
    arguments. The smallest S that screens z off from the rest of A is

    .. math:: S = \{a \in A : z \text{ is not d-separated from } a \text{ by } A \setminus \{a\}\},

    since densities that are positive everywhere make conditional independence a graphoid with intersection. In the moral graph
    of the ancestors of z and A, those are the nodes of A next to the nodes outside A that z is connected with (z included): one
    search answers for all.

    Rows are independent given the globals, so the graph has one row. An inner plate is unrolled to two copies, z's own and a
    sibling. Two are enough: renaming copies beyond the second to the second one keeps every edge, and which nodes are in A, so it
    maps a path to a third copy onto one to the second; and each path between two copies is one among more.

    Args:
        nodes: The nodes, in the model's order. Observed sites outside the data plate take no part, as their values never change.
        parents: For each site the names of what its distribution is computed from; names that are no node are passed over.
        ordered: Plates along which every index depends on every other, as the steps of a vectorised time series do. In other
            plates two nodes are connected at equal indices only.

    Returns:
        For each local latent, in sampling order, its inputs: latents in sampling order, then observations and arguments in the
        model's order.

    Example:
        >>> def node(name, kind="latent"): return Node(name, kind, frozenset(), True)
        >>> chain = [node("z1"), node("z2"), node("x", "observed")]
        >>> wired = wire(chain, {"z2": frozenset({"z1"}), "x": frozenset({"z2"})})
        >>> {name: [source.name for source in sources] for name, sources in wired.items()}
        {'z1': ['x'], 'z2': ['z1', 'x']}
    """
    graph = _Graph(nodes, parents, ordered)
    order = sampling_order(nodes)
    known = {node.name for node in nodes if node.kind in ("observed", "argument")}
    ranks = {name: rank for rank, name in enumerate([*order, *(node.name for node in nodes if node.name in known)])}
    wired = {}
    for place, name in enumerate(order):
        if graph.nodes[name].is_local:
            found = {graph.source(instance, name) for instance in graph.blanket(name, known.union(order[:place]))}
            wired[name] = tuple(
                sorted(found, key=lambda item: (ranks[item.name], len(item.pooled), sorted(item.pooled)))
            )
    return wired


class _Graph:
    """A model's graph for one row, inner plates unrolled to two copies."""

    def __init__(self, nodes: Sequence[Node], parents: Mapping[str, frozenset[str]], ordered: frozenset[str]) -> None:
        self.nodes = {node.name: node for node in nodes if node.is_local or node.kind == "latent"}
        self._plates = {name: tuple(sorted(node.plates)) if node.is_local else () for name, node in self.nodes.items()}
        self._parents: dict[_Instance, list[_Instance]] = {}
        self._children: dict[_Instance, list[_Instance]] = {
            (name, copies): [] for name in self.nodes for copies in product(_COPIES, repeat=len(self._plates[name]))
        }
        for child in self._children:
            self._parents[child] = [
                parent
                for name in self.nodes
                if name in parents.get(child[0], ())
                for parent in self._meeting(name, child, ordered)
            ]
        for child, above in self._parents.items():
            for parent in above:
                self._children[parent].append(child)

    def _meeting(self, name: str, child: _Instance, ordered: frozenset[str]) -> Iterator[_Instance]:
        """Yield the instances of a parent that an instance of its child is computed from."""
        own = dict(zip(self._plates[child[0]], child[1], strict=True))
        choices = [(own[plate],) if plate in own and plate not in ordered else _COPIES for plate in self._plates[name]]
        return ((name, copies) for copies in product(*choices))

    def blanket(self, name: str, known: Collection[str]) -> set[_Instance]:
        """Return the known instances that a node's own instance is not separated from by the other known ones."""
        start: _Instance = (name, (0,) * len(self._plates[name]))
        ancestral = self._ancestral(start, known)
        component, pending, found, married = {start}, [start], set(), set()
        while pending:
            node = pending.pop()
            children = [child for child in self._children[node] if child in ancestral]
            spouses = [spouse for child in children if child not in married for spouse in self._parents[child]]
            married.update(children)
            for other in (*self._parents[node], *children, *spouses):
                if other[0] in known:
                    found.add(other)
                elif other not in component:  # a factor too: it leads to its parents only, which are here anyway
                    component.add(other)
                    pending.append(other)
        return found

    def _ancestral(self, start: _Instance, known: Collection[str]) -> set[_Instance]:
        """Return an instance, all known ones, factors, and the ancestors of these: other nodes carry nothing between them."""
        pending = [start]
        pending += [node for node in self._parents if node[0] in known or self.nodes[node[0]].kind == "factor"]
        found = set(pending)
        while pending:
            new = [parent for parent in self._parents[pending.pop()] if parent not in found]
            found.update(new)
            pending += new
        return found

    def source(self, instance: _Instance, reader: str) -> Source:
        """Say how an instance reads to the own instance of another node."""
        name, copies = instance
        shared = self._plates[reader]
        return Source(
            name,
            frozenset(
                plate
                for plate, copy in zip(self._plates[name], copies, strict=True)
                if copy == 1 or plate not in shared
            ),
        )
