"""What each encoder must see, against pairwise d-separation by networkx on graphs unrolled to three copies of each plate."""

import random
import time
from itertools import product

import networkx as nx
import pytest

from pyro_aevb.guides.wiring import Node, Source, sampling_order, wire

COPIES = 3


def node(name, kind="latent", plates="", *, is_local=True):
    return Node(name, kind, frozenset(plates.split()), is_local)


def graph_of(text):
    """Read ``{"x": "z y"}`` as the parents of x."""
    return {name: frozenset(parents.split()) for name, parents in text.items()}


def sources(text):
    """Read ``"z x|rows"`` as z's own instance, and x pooled over its plate ``rows``; plates are joined by commas."""
    items = (item.partition("|") for item in text.split())
    return tuple(Source(name, frozenset(plates.split(",")) - {""}) for name, _, plates in items)


def plates_of(item):
    return sorted(item.plates) if item.is_local else []


def unroll(nodes, parents, ordered):
    """Write the graph out, three copies of each plate."""
    graph = nx.DiGraph()
    instances = {}
    for item in nodes:
        plates = plates_of(item)
        instances[item.name] = [
            (item.name, tuple(zip(plates, copies, strict=True)))
            for copies in product(range(COPIES), repeat=len(plates))
        ]
        graph.add_nodes_from(instances[item.name])
    for child, names in parents.items():
        for name in names:
            for (_, above), (_, below) in product(instances[name], instances[child]):
                own = dict(below)
                if all(plate in ordered or own.get(plate, copy) == copy for plate, copy in above):
                    graph.add_edge((name, above), (child, below))
    return graph, instances


def oracle(nodes, parents, ordered=frozenset()):
    """Ask of each known instance by itself whether all others separate it from the latent."""
    graph, instances = unroll(nodes, parents, ordered)
    latents = [item for item in nodes if item.kind == "latent"]
    order = sorted(latents, key=lambda item: (item.is_local, len(plates_of(item))))
    always = {instance for item in nodes if item.kind == "factor" for instance in instances[item.name]}
    answer = {}
    for place, latent in enumerate(order):
        if not latent.is_local:
            continue
        names = [item.name for item in order[:place]]
        names += [item.name for item in nodes if item.kind in ("observed", "argument")]
        known = {instance for name in names for instance in instances[name]}
        own = (latent.name, tuple((plate, 0) for plate in plates_of(latent)))
        found = set()
        for instance in known:
            given = (known | always) - {instance}
            if not nx.is_d_separator(graph, {own}, {instance}, given):
                pooled = {plate for plate, copy in instance[1] if copy > 0 or plate not in latent.plates}
                found.add(Source(instance[0], frozenset(pooled)))
        answer[latent.name] = found
    return answer


CASES = {
    "factorised": (
        [node("z1"), node("z2"), node("x1", "observed"), node("x2", "observed")],
        {"x1": "z1", "x2": "z2"},
        {"z1": "x1", "z2": "x2"},
    ),
    "hierarchy": (
        [node("z1"), node("z2"), node("x", "observed")],
        {"z2": "z1", "x": "z2"},
        {"z1": "x", "z2": "z1 x"},
    ),
    "collider": (
        [node("z1"), node("z2"), node("x", "observed")],
        {"x": "z1 z2"},
        {"z1": "x", "z2": "z1 x"},
    ),
    "chain": (
        [node("z1"), node("x1", "observed"), node("z2"), node("x2", "observed"), node("z3"), node("x3", "observed")],
        {"x1": "z1", "z2": "z1", "x2": "z2", "z3": "z2", "x3": "z3"},
        {"z1": "x1 x2 x3", "z2": "z1 x2 x3", "z3": "z2 x3"},
    ),
    "chain that reads its past": (
        [node("z1"), node("x1", "observed"), node("z2"), node("x2", "observed")],
        {"x1": "z1", "z2": "z1 x1", "x2": "z2 x1"},
        {"z1": "x1 x2", "z2": "z1 x1 x2"},
    ),
    "globals": (
        [node("g", is_local=False), node("h", is_local=False), node("z"), node("x", "observed")],
        {"h": "g", "z": "h", "x": "z g"},
        {"z": "g h x"},
    ),
    "global that decides nothing": (
        [node("g", is_local=False), node("h", is_local=False), node("z"), node("x", "observed")],
        {"h": "g", "z": "h", "x": "z"},
        {"z": "h x"},
    ),
    "groups": (
        [node("row", plates="rows"), node("group"), node("x", "observed", "rows")],
        {"row": "group", "x": "row"},
        {"group": "x|rows", "row": "group x"},
    ),
    "groups with a value of their own": (
        [node("group"), node("row", plates="rows"), node("x", "observed", "rows"), node("y", "observed")],
        {"row": "group", "x": "row", "y": "group"},
        {"group": "x|rows y", "row": "group x"},
    ),
    "inner latents under one sum": (
        [node("z", plates="rows"), node("x", "observed")],
        {"x": "z"},
        {"z": "x"},
    ),
    "inner latents under one sum, each seen": (
        [node("z", plates="rows"), node("y", "observed", "rows"), node("x", "observed")],
        {"x": "z", "y": "z"},
        {"z": "y y|rows x"},
    ),
    "crossed plates": (
        [node("a", plates="a"), node("b", plates="b"), node("x", "observed", "a b")],
        {"x": "a b"},
        {"a": "x|b x|a,b", "b": "a|a x|a"},
    ),
    "nested plates": (
        [node("top"), node("mid", plates="a"), node("low", plates="a b"), node("x", "observed", "a b")],
        {"mid": "top", "low": "mid", "x": "low"},
        {"top": "x|a,b", "mid": "top x|b", "low": "mid x"},
    ),
    "regression": (
        [node("@c", "argument"), node("z"), node("x", "observed")],
        {"x": "z @c"},
        {"z": "@c x"},
    ),
    "argument for masks only": (
        [node("@lengths", "argument"), node("z"), node("x", "observed")],
        {"x": "z"},
        {"z": "x"},
    ),
    "argument of the prior": (
        [node("@c", "argument"), node("z1"), node("z2"), node("x", "observed")],
        {"z1": "@c", "z2": "z1", "x": "z2"},
        {"z1": "@c x", "z2": "z1 x"},
    ),
    "factor": (
        [node("@c", "argument"), node("z1"), node("z2"), node("f", "factor"), node("x", "observed")],
        {"f": "z1 z2 @c", "x": "z2"},
        {"z1": "@c x", "z2": "z1 @c x"},
    ),
    "hidden child without effect": (
        [node("z1"), node("z2"), node("z3"), node("x", "observed")],
        {"z3": "z1 z2", "x": "z1"},
        {"z1": "x", "z2": "", "z3": "z1 z2"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_encoder_sees_what_the_posterior_depends_on(case):
    nodes, parents, expected = CASES[case]
    wired = wire(nodes, graph_of(parents))
    assert wired == {name: sources(text) for name, text in expected.items()}
    assert {name: set(found) for name, found in wired.items()} == oracle(nodes, graph_of(parents))


def test_a_series_along_a_plate_sees_its_own_step_and_the_whole():
    nodes = [node("eps", plates="time"), node("x", "observed", "time")]
    wired = wire(nodes, graph_of({"x": "eps"}), ordered=frozenset({"time"}))
    assert wired == {"eps": sources("x x|time")}
    assert wire(nodes, graph_of({"x": "eps"})) == {"eps": sources("x")}


def random_graph(seed):
    chance = random.Random(seed)
    places = ["", "", "a", "a b", "b"]
    nodes = []
    for index in range(chance.randint(4, 8)):
        kind = chance.choice(["latent", "latent", "observed", "argument", "factor"])
        is_local = kind != "latent" or chance.random() > 0.15
        nodes.append(node(f"{kind}{index}", kind, chance.choice(places) if is_local else "", is_local=is_local))
    parents = {}
    for index, child in enumerate(nodes):
        allowed = [
            item.name for item in nodes[:index] if item.kind != "factor" and (child.is_local or not item.is_local)
        ]
        if child.kind != "argument":
            parents[child.name] = frozenset(name for name in allowed if chance.random() < 0.4)
    return nodes, parents, frozenset(plate for plate in "ab" if chance.random() < 0.3)


def test_any_graph_is_wired_as_pairwise_separation_says():
    wired_sources = 0
    for seed in range(400):
        nodes, parents, ordered = random_graph(seed)
        found = {name: set(items) for name, items in wire(nodes, parents, ordered=ordered).items()}
        assert found == oracle(nodes, parents, ordered), seed
        wired_sources += sum(map(len, found.values()))
    assert wired_sources > 1000


def test_sampling_order_is_globals_then_outer_plates_then_the_model():
    nodes = [
        node("low", plates="a b"), node("x", "observed"), node("right", plates="b"), node("left", plates="a"),
        node("first"), node("second"), node("weights", is_local=False, plates="a b"),
    ]  # fmt: skip
    assert sampling_order(nodes) == ["weights", "first", "second", "right", "left", "low"]


def test_inputs_come_in_sampling_order_then_the_models_with_their_own_instance_first():
    nodes = [
        node("@c", "argument"), node("w", plates="a"), node("x", "observed", "a"), node("z"), node("g", is_local=False),
        node("y", "observed"),
    ]  # fmt: skip
    wired = wire(nodes, graph_of({"x": "w z g @c", "y": "w z"}))
    assert list(wired) == ["z", "w"]
    assert wired["w"] == sources("g z @c x x|a y")


def test_observations_outside_the_data_plate_take_no_part():
    nodes = [node("g", is_local=False), node("y", "observed", is_local=False), node("z"), node("x", "observed")]
    assert wire(nodes, graph_of({"y": "g", "z": "g y", "x": "z"})) == {"z": sources("g x")}


def test_names_that_are_no_node_are_passed_over():
    assert wire([node("z"), node("x", "observed")], graph_of({"x": "z gone", "gone": "z"})) == {"z": sources("x")}


def test_a_long_series_is_wired_at_once():
    steps = 50
    nodes, parents = [node("g", is_local=False)], {}
    for t in range(steps):
        nodes += [node(f"z{t}"), node(f"x{t}", "observed")]
        parents |= {f"z{t}": f"g z{t - 1}" if t else "g", f"x{t}": f"z{t}"}
    start = time.perf_counter()
    wired = wire(nodes, graph_of(parents))
    assert time.perf_counter() - start < 1.0
    for t in range(steps):
        before = ["g", f"z{t - 1}"] if t else ["g"]
        assert [source.name for source in wired[f"z{t}"]] == before + [f"x{s}" for s in range(t, steps)]
