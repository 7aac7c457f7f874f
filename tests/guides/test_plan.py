"""Plans from wirings written by hand: which latents share networks, and what each reads."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_aevb import AutoAmortizedNormal
from pyro_aevb.guides.plan import Group, Series, Unit, plan_units
from pyro_aevb.guides.wiring import Source
from pyro_aevb.program.structure import read_structure

NONE = frozenset()


def sources(*names, pooled=()):
    return tuple(Source(name, frozenset(pooled)) for name in names)


def chain(steps, *, first=1, support=None, width=1):
    """Return a state-space model's structure, its states ``z_1, z_2, ...``."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(first, first + steps):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t - first])

    return read_structure(model, (torch.randn(6, steps),))


def backward(steps):
    """Wire step t to the state before it and to what is observed from t on."""
    return {
        f"z_{t}": (*(sources(f"z_{t - 1}") if t > 1 else ()), *sources(*(f"x_{s}" for s in range(t, steps + 1))))
        for t in range(1, steps + 1)
    }


def test_steps_of_a_loop_share_a_head_and_a_reader():
    (unit,) = plan_units(chain(4), backward(4))
    assert unit == Unit(
        latents=("z_1", "z_2", "z_3", "z_4"),
        groups=(),
        series=Series((("x_1", "x_2", "x_3", "x_4"),), (0, 1, 2, 3), "backward"),
        parents=((None, "z_1", "z_2", "z_3"),),
    )


def test_numbers_of_steps_may_start_anywhere():
    wiring = {
        f"z_{t}": (*(sources(f"z_{t - 1}") if t > 8 else ()), *sources(*(f"x_{s}" for s in range(t, 12))))
        for t in range(8, 12)
    }
    (unit,) = plan_units(chain(4, first=8), wiring)
    assert unit.latents == ("z_8", "z_9", "z_10", "z_11")  # by number, not by name
    assert unit.series == Series((("x_8", "x_9", "x_10", "x_11"),), (0, 1, 2, 3), "backward")


def test_two_steps_are_no_series():
    units = plan_units(chain(2), backward(2))
    assert [unit.latents for unit in units] == [("z_1",), ("z_2",)]
    assert units[0].groups == (Group(("x_1", "x_2"), (), NONE),)
    assert units[1] == Unit(("z_2",), (Group(("x_2",), (), NONE),), None, (("z_1",),))


def test_directions():
    structure = chain(3)
    forward = {f"z_{t}": sources(*(f"x_{s}" for s in range(1, t + 1))) for t in (1, 2, 3)}
    both = {f"z_{t}": sources("x_1", "x_2", "x_3") for t in (1, 2, 3)}
    own = {f"z_{t}": sources(f"x_{t}") for t in (1, 2, 3)}
    assert [plan_units(structure, wiring)[0].series.direction for wiring in (forward, both, own)] == [
        "forward",
        "both",
        "backward",
    ]


def test_steps_that_need_other_things_are_no_series():
    wiring = backward(4) | {"z_2": (*sources("z_1", "x_2", "x_3", "x_4"), *sources("@c"))}
    units = plan_units(chain(4), wiring)
    assert [unit.latents for unit in units] == [("z_1",), ("z_2",), ("z_3",), ("z_4",)]


def test_a_parent_that_a_step_could_have_and_has_not_breaks_the_series():
    wiring = backward(4) | {"z_3": sources("x_3", "x_4")}
    assert len(plan_units(chain(4), wiring)) == 4


def test_what_all_steps_need_is_read_once():
    wiring = {name: (*needs, *sources("@c", "scale")) for name, needs in backward(3).items()}

    def model(x, c):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = c
            for t in (1, 2, 3):
                z = pyro.sample(f"z_{t}", dist.Normal(z, scale))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t - 1])

    structure = read_structure(model, (torch.randn(6, 3), torch.randn(6)))
    (unit,) = plan_units(structure, wiring)
    assert unit.groups == (Group(("@c",), (), NONE),)
    assert unit.parents == ((None, "z_1", "z_2"), ("scale", "scale", "scale"))


def test_sources_are_grouped_by_what_they_are_pooled_over():
    def model(x, y):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 4, dim=-1):
                w = pyro.sample("w", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    structure = read_structure(model, (torch.randn(6, 4), torch.randn(6, 1)))
    inner = frozenset({"inner"})
    wiring = {"z": (*sources("y"), *sources("x", pooled=inner)), "w": (*sources("z", "x"), *sources("w", pooled=inner))}
    first, second = plan_units(structure, wiring)
    assert first == Unit(("z",), (Group(("y",), (), NONE), Group(("x",), (), inner)), None, ())
    assert second == Unit(("w",), (Group(("x",), (), NONE), Group((), ("w",), inner)), None, (("z",),))


def test_steps_of_other_kinds_are_no_series():
    """Sites that share a stem and a number, but not their support."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_1", dist.Normal(0.0, 1.0))
            y = pyro.sample("z_2", dist.Gamma(1.0, 1.0))
            w = pyro.sample("z_3", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + y + w, 1.0), obs=x)

    structure = read_structure(model, (torch.randn(6),))
    wiring = {f"z_{t}": sources("x") for t in (1, 2, 3)}
    assert len(plan_units(structure, wiring)) == 3


def test_lags_of_two_steps_are_slots_of_their_own():
    """z_t depends on z_{t-1} and z_{t-2}, so that q needs both."""

    def model(x):
        with pyro.plate("data", len(x)):
            states = [torch.zeros(len(x)), torch.zeros(len(x))]
            for t in range(5):
                states.append(pyro.sample(f"z_{t}", dist.Normal(states[-1] - 0.5 * states[-2], 1.0)))
                pyro.sample(f"x_{t}", dist.Normal(states[-1], 1.0), obs=x[:, t])

    (unit,) = AutoAmortizedNormal(model).build(torch.randn(6, 5)).built.units
    assert unit.parents == ((None, None, "z_0", "z_1", "z_2"), (None, "z_0", "z_1", "z_2", "z_3"))
    assert unit.series.direction == "backward"


def test_a_loop_without_dependence_reads_its_own_observation():
    def model(x):
        with pyro.plate("data", len(x)):
            for t in range(4):
                z = pyro.sample(f"z{t}", dist.Normal(0.0, 1.0))
                with poutine.mask(mask=torch.tensor(True)):
                    pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    guide = AutoAmortizedNormal(model).build(torch.randn(6, 4))
    assert {name: [source.name for source in needs] for name, needs in guide.built.wiring.items()} == {
        f"z{t}": [f"x{t}"] for t in range(4)
    }
    (unit,) = guide.built.units
    assert unit.parents == ()
