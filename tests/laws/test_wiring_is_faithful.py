"""On Gaussian programs the wiring is exact: what is wired is enough for each latent's regression, and none of it is idle.

Random graphs are written as Pyro models, read and wired. The oracle is linear algebra on the joint precision of one row: a
latent's partial correlation with what is known when it is drawn, given all else that is known, is 0 exactly where nothing is
wired. Each pair of indices has a random weight of its own, so that nothing vanishes by symmetry.
"""

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_aevb.errors import AEVBWarning
from pyro_aevb.guides.wiring import Node, Source, sampling_order, wire
from pyro_aevb.program.dependencies import read_dependencies
from pyro_aevb.program.structure import read_structure

SIZE, ROWS = 3, 2
SHAPES = {"": (ROWS,), "a": (SIZE, ROWS), "b": (SIZE, 1, ROWS), "ba": (SIZE, SIZE, ROWS)}
"""Shape of a local site by its inner plates: b at dimension -3, a at -2, the rows at -1."""


@dataclass
class Site:
    """A Gaussian site, with weights ``[own instances, instances of the parent]`` for each parent."""

    name: str
    kind: str
    plates: str
    is_local: bool
    scale: float
    weights: dict[str, np.ndarray]

    @property
    def instances(self):
        return list(product(range(SIZE), repeat=len(self.plates)))


def draw_sites(seed, *, ordered=""):
    """Draw a graph of 2 to 5 latents, 1 to 4 observations and at most one argument ``@c``."""
    rng = np.random.default_rng(seed)
    kinds = ["latent"] * rng.integers(2, 6) + ["observed"] * rng.integers(1, 5)
    rng.shuffle(kinds)
    choices = ["", "", "a"] if ordered else ["", "", "", "a", "a", "b", "ba"]
    sites = [Site("@c", "argument", "", True, 1.0, {})] * int(rng.random() < 0.4)
    for index, kind in enumerate(kinds):
        is_local = kind == "observed" or rng.random() > 0.2
        plates = str(rng.choice(choices)) if is_local else ""
        site = Site(f"{kind}_{index}", kind, plates, is_local, rng.uniform(0.5, 1.5), {})
        for parent in sites:
            if (is_local or not parent.is_local) and rng.random() < 0.5:
                site.weights[parent.name] = draw_weights(rng, site, parent, ordered)
        sites.append(site)
    return sites


def draw_weights(rng, child, parent, ordered):
    """Draw weights away from 0 between instances that agree on the plates both have; on ordered plates all meet."""
    weights = rng.choice([-1.0, 1.0], (len(child.instances), len(parent.instances)))
    weights *= rng.uniform(0.5, 1.5, weights.shape)
    for (row, below), (column, above) in product(enumerate(child.instances), enumerate(parent.instances)):
        own, other = dict(zip(child.plates, below, strict=True)), dict(zip(parent.plates, above, strict=True))
        if any(own[plate] != other[plate] for plate in own.keys() & other.keys() - set(ordered)):
            weights[row, column] = 0.0
    return weights


def program_of(sites):
    """Write the sites as a Pyro model of an argument and of data by site."""

    def model(c, data):
        plates = {"a": pyro.plate("a", SIZE, dim=-2), "b": pyro.plate("b", SIZE, dim=-3)}
        rows = pyro.plate("data", ROWS, dim=-1)
        values = {"@c": c[None]}
        for site in sites:
            if site.kind == "argument":
                continue
            mean = sum(
                (torch.as_tensor(weights) @ values[name] for name, weights in site.weights.items()),
                torch.zeros(1, 1, dtype=torch.float64),
            )
            with ExitStack() as stack:
                for plate in [rows, *(plates[name] for name in site.plates)] if site.is_local else []:
                    stack.enter_context(plate)
                shape = SHAPES[site.plates] if site.is_local else ()
                mean = mean.expand(len(site.instances), ROWS if site.is_local else 1).reshape(shape)
                value = pyro.sample(site.name, dist.Normal(mean, site.scale), obs=data.get(site.name))
            values[site.name] = value.reshape(len(site.instances), -1)

    return model


def wiring_of(sites):
    """Read the model and wire it."""
    data = {
        site.name: torch.randn(SHAPES[site.plates], dtype=torch.float64) for site in sites if site.kind == "observed"
    }
    batch = (torch.randn(ROWS, dtype=torch.float64), data)
    model = program_of(sites)
    structure = read_structure(model, batch, data_plate="data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AEVBWarning)  # some latents have no effect
        read = read_dependencies(model, batch, {}, structure)
    nodes = [Node(name, "argument", frozenset(), True) for name in read.arguments]
    nodes += [
        Node(name, site.kind, frozenset(site.plates) - {"data"} if site.is_local else frozenset(), site.is_local)
        for name, site in structure.sites.items()
    ]
    return sampling_order(nodes), wire(nodes, read.parents, ordered=read.ordered), read


def covariance(sites):
    """Return the instances of one row and their joint covariance (I - B)^-1 D (I - B)^-T."""
    names = [(site.name, copies) for site in sites for copies in site.instances]
    place = {name: index for index, name in enumerate(names)}
    by_name = {site.name: site for site in sites}
    edges, variances = np.zeros((len(names), len(names))), np.zeros(len(names))
    for site in sites:
        for row, copies in enumerate(site.instances):
            variances[place[site.name, copies]] = site.scale**2
            for parent, weights in site.weights.items():
                for column, above in enumerate(by_name[parent].instances):
                    edges[place[site.name, copies], place[parent, above]] = weights[row, column]
    mixing = np.linalg.inv(np.eye(len(names)) - edges)
    return names, mixing @ np.diag(variances) @ mixing.T


def partial_correlations(sites, latent, known):
    """Correlate a latent's first instance with each known instance, given all other known ones."""
    names, joint = covariance(sites)
    own = (latent, (0,) * len(next(site.plates for site in sites if site.name == latent)))
    chosen = [own] + [name for name in names if name[0] in known]
    index = [names.index(name) for name in chosen]
    precision = np.linalg.inv(joint[np.ix_(index, index)])
    scale = np.sqrt(np.diag(precision))
    return dict(zip(chosen[1:], -precision[0, 1:] / (scale[0] * scale[1:]), strict=True))


def check(sites):
    """Compare the wiring with the regression of every local latent; return how often each answer was given."""
    order, wired, read = wiring_of(sites)
    by_name = {site.name: site for site in sites}
    seen = {name for name, site in by_name.items() if site.kind != "latent"}
    counts = {True: 0, False: 0}
    assert read.parents == {site.name: site.weights.keys() for site in sites if site.kind != "argument"}
    for place, latent in enumerate(order):
        if not by_name[latent].is_local:
            continue
        needed = set()
        for (name, copies), value in partial_correlations(sites, latent, seen.union(order[:place])).items():
            pairs = zip(by_name[name].plates, copies, strict=True)
            pooled = {plate for plate, copy in pairs if copy > 0 or plate not in by_name[latent].plates}
            source, is_needed = Source(name, frozenset(pooled)), bool(abs(value) > 1e-6)
            assert is_needed or abs(value) < 1e-8, (latent, name, copies, value)
            assert is_needed == (source in wired[latent]), (latent, name, copies, value)  # the same for every copy
            counts[is_needed] += 1
            needed |= {source} if is_needed else set()
        assert set(wired[latent]) == needed
    return counts, read


@pytest.mark.parametrize("seeds", [range(50), range(50, 100), range(100, 150)], ids=str)
def test_wired_is_what_the_regression_needs(seeds):
    totals = {True: 0, False: 0}
    for seed in seeds:
        counts, read = check(draw_sites(seed))
        assert read.ordered == frozenset()
        totals = {answer: totals[answer] + counts[answer] for answer in totals}
    assert min(totals.values()) > 100, totals


def test_wired_is_what_the_regression_needs_along_an_ordered_plate():
    along = 0
    for seed in range(20):
        sites = draw_sites(seed, ordered="a")
        _, read = check(sites)
        places = {site.name: site.plates for site in sites}
        meets = any(site.plates == places[name] == "a" for site in sites for name in site.weights)
        assert read.ordered == (frozenset("a") if meets else frozenset())
        along += meets
    assert along > 5
