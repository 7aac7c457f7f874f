"""Explanations say what the guide reads, and drawings have the edges of the wiring."""

import re
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from model_classes.registry import REGISTRY
from torch import nn
from torch.distributions import constraints

from pyro_aevb import AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.errors import GuideError, SettingError
from pyro_aevb.guides.explaining import Line

KINDS = ["chain", "conditional_vae", "crossed", "decoder_weights", "fork", "globals_ragged", "innovations"]
KINDS += ["images_linear", "label_and_style", "markov_loop", "nan_coded", "ragged_series", "regression"]
every_kind = pytest.mark.parametrize("name", KINDS)


def build(name: str, kind=AutoAmortizedNormal, **settings):
    entry = REGISTRY[name]
    args, kwargs = entry.batch() if entry.joint else entry.test_batch()
    return kind(entry.model, data_plate=entry.data_plate, **settings).build(*args, **kwargs)


def build_scalar(prior, event_dim: int = 0):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.flatten(x.dim()).sum(-1) if event_dim else z, 1.0), obs=x)

    return AutoAmortizedNormal(model).build(torch.zeros(4))


class TestExplain:
    def test_a_table_in_plain_text(self):
        explanation = build("globals_hierarchical").explain()
        header, *table = str(explanation).splitlines()
        assert header.startswith("AutoAmortizedNormal: data plate 'data', 60 rows when it was built;")
        assert table == [
            "latent | support  | family | parents | observations               | encoder",
            "-------+----------+--------+---------+----------------------------+-------------",
            "mu     | real     | Normal | -       | -                          | free",
            "tau    | (0, inf) | Normal | -       | -                          | free",
            "theta  | real     | Normal | mu, tau | x pooled over observations | SetEncoder 1",
        ]
        assert repr(explanation) == str(explanation)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("markov_loop", ("z_1 ... z_8", "z_1 ... z_7 (1 step before)", "x_1 ... x_8 read backward")),
            ("innovations", ("step in time", "-", "x, x in order along time")),
            ("crossed", ("line in lines", "level", "x pooled over columns, x pooled over columns and lines")),
            ("crossed", ("column in columns", "line pooled over lines", "x pooled over lines")),
            ("nested_latents", ("z in inner", "theta", "x")),
            ("label_covariate", ("z", "-", "x, argument label")),
            ("nan_coded", ("z", "-", "x as a vector along features")),
            ("decoder_weights", ("loading in features", "-", "-")),
            ("label_and_style", ("z", "y_unobserved", "y_observed, x, argument labelled")),
        ],
    )
    def test_what_a_latent_is_given(self, name, expected):
        lines = build(name).explain().lines
        assert expected in [(line.latent, line.parents, line.observations) for line in lines]

    @every_kind
    def test_columns_are_aligned_and_every_latent_is_there(self, name):
        guide = build(name)
        explanation = guide.explain()
        _, titles, rule, *rows = str(explanation).splitlines()
        bars = [place for place, letter in enumerate(titles) if letter == "|"]
        assert bars == [place for place, letter in enumerate(rule) if letter == "+"]
        assert all(row[place] == "|" for row in rows for place in bars)
        series = [unit.latents for unit in guide.built.units if len(unit.latents) > 1]
        alone = {site.name for site in guide.built.structure.select("latent")} - {n for unit in series for n in unit}
        shown = {line.latent.split(" in ")[0] for line in explanation.lines}
        assert shown == alone | {f"{unit[0]} ... {unit[-1]}" for unit in series}

    @pytest.mark.parametrize(
        ("prior", "text"),
        [
            (dist.Normal(0.0, 1.0), "real"),
            (dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), "real [2, 3]"),
            (dist.HalfNormal(1.0), "(0, inf)"),
            (dist.Uniform(-1.0, 2.5), "(-1, 2.5)"),
            (dist.Dirichlet(torch.ones(3)), "simplex [3]"),
            (dist.LKJCholesky(2, 1.0), "corr cholesky [2, 2]"),
            (dist.VonMises(0.0, 1.0), "circle"),
        ],
        ids=lambda item: item if isinstance(item, str) else "",
    )
    def test_supports(self, prior, text):
        assert build_scalar(prior, prior.event_dim).explain().lines[0].support == text

    def test_a_support_with_an_end_above_and_one_that_varies(self):
        class Below(dist.TransformedDistribution):
            support = constraints.less_than(2.0)

            def expand(self, batch_shape, _instance=None):
                return super().expand(batch_shape, self._get_checked_instance(Below, _instance))

        below = Below(dist.LogNormal(0.0, 1.0), [dist.transforms.AffineTransform(2.0, -1.0)])
        assert build_scalar(below).explain().lines[0].support == "(-inf, 2)"

        def model(x, top):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(torch.zeros(len(x)), top))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model).build(torch.zeros(4), torch.arange(1.0, 5.0))
        assert guide.explain().lines[0].support == "(0, varies)"

    def test_equal_numbers_are_one_network(self):
        guide = build("fork", AutoAmortizedMultivariateNormal)
        first, second, third = (line.encoder for line in guide.explain().lines)
        assert (first, second, third) == ("MLPEncoder 1", "MLPEncoder 2", "MLPEncoder 2")
        assert len(guide.networks.of_locals.encoders) == 2

    def test_encoders_of_the_users(self):
        class Mine(nn.Linear):
            pass

        lines = build("chain", encoder={"z1": Mine(4, 3)}).explain().lines
        assert [line.encoder for line in lines] == ["Mine 1", "MLPEncoder 2"]

    @every_kind
    def test_it_says_whether_the_model_is_run_for_a_batch(self, name):
        entry, runs = REGISTRY[name], Counter()

        def model(*args, **kwargs):
            runs["model"] += 1
            entry.model(*args, **kwargs)

        args, kwargs = entry.batch() if entry.joint else entry.test_batch()
        guide = AutoAmortizedNormal(model, data_plate=entry.data_plate).build(*args, **kwargs)
        before = runs["model"]
        guide(*args, **kwargs)
        is_run = "a run of the model reads each batch" in str(guide.explain())
        assert is_run == (runs["model"] > before)
        assert is_run != ("batches are read from their tensors" in str(guide.explain()))

    def test_a_model_without_rows(self):
        entry = REGISTRY["regression"]
        args, kwargs = entry.batch()
        guide = AutoAmortizedNormal(entry.model, data_plate=None).build(*args, **kwargs)
        assert "no data plate, the whole model is one row" in guide.explain().header

    def test_a_guide_that_is_not_built(self):
        guide = AutoAmortizedNormal(REGISTRY["chain"].model)
        for ask in (guide.explain, guide.render):
            with pytest.raises(GuideError, match=r"build\(\*batch\)"):
                ask()

    def test_a_line_has_the_columns_of_the_table(self):
        line = build("chain").explain().lines[1]
        assert line == Line("z2", "real [2]", "Normal", "z1", "x", "MLPEncoder 1")


class Graph:
    """What a graph's text says, read line by line."""

    def __init__(self, text: str) -> None:
        self.nodes: dict[str, tuple[tuple[str, ...], str, str]] = {}
        self.edges: Counter[tuple[str, str, frozenset[str]]] = Counter()
        path: list[str] = []
        first, *lines, last = text.splitlines()
        assert (first, last) == ("digraph {", "}")
        for line in map(str.strip, lines):
            if line.startswith("subgraph"):
                path.append("")
            elif line.startswith("label="):
                path[-1] = re.match(r'label="([^"]*)"', line)[1]
            elif line == "}":
                path.pop()
            elif edge := re.fullmatch(r'"(.*)" -> "(.*?)"( \[style=dashed label="(.*)"\])?;', line):
                plates = frozenset(edge[4].split(", ")) if edge[3] else frozenset()
                self.edges[edge[1], edge[2], plates] += 1
            else:
                node = re.fullmatch(r'"(.*?)" \[label="(.*)" shape=(\w+) style=filled fillcolor=(\w+)\];', line)
                assert node[1] not in self.nodes
                self.nodes[node[1]] = (tuple(path), node[3], node[4])
        assert not path


class TestRender:
    @every_kind
    def test_edges_are_those_of_the_wiring(self, name):
        guide = build(name)
        graph = Graph(guide.render())
        wired = [(item.name, to, item.pooled) for to, sources in guide.built.wiring.items() for item in sources]
        assert graph.edges == Counter(wired)
        assert {end for edge in graph.edges for end in edge[:2]} <= set(graph.nodes)

    @every_kind
    def test_nodes_lie_in_their_plates_and_are_drawn_by_kind(self, name):
        guide = build(name)
        graph, sites = Graph(guide.render()), guide.built.structure.sites
        latents = {site.name for site in guide.built.structure.select("latent")}
        assert latents <= set(graph.nodes)
        for node, (path, shape, colour) in graph.nodes.items():
            if node.startswith("@"):
                assert (shape, colour, path[0]) == ("box", "grey85", "data")
            else:
                assert (shape, path) == ("ellipse", sites[node].plates)
                assert colour == ("white" if node in latents else "grey85")

    def test_an_argument_lies_in_the_plates_of_its_axes(self):
        assert Graph(build("mixed_regression").render()).nodes["@x"][0] == ("data", "inner")

    def test_names_are_quoted(self):
        def model(x):
            with pyro.plate('the "rows"', len(x)):
                z = pyro.sample("a\\b", dist.Normal(0.0, 1.0))
                pyro.sample('"x"', dist.Normal(z, 1.0), obs=x)

        text = AutoAmortizedNormal(model).build(torch.zeros(3)).render()
        assert r'"\"x\"" -> "a\\b";' in text
        assert r'label="the \"rows\""' in text

    @pytest.mark.parametrize("suffix", [".dot", ".gv"])
    def test_text_is_written(self, tmp_path, suffix):
        guide = build("chain")
        text = guide.render(tmp_path / f"guide{suffix}")
        assert (tmp_path / f"guide{suffix}").read_text() == text == guide.render()

    def test_a_picture_without_graphviz(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(SettingError, match=r"\.dot or \.gv"):
            build("chain").render(str(tmp_path / "guide.svg"))
        assert not list(tmp_path.iterdir())
