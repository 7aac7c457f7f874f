"""Models, batches and settings that no guide can be built for: an error of our own says what was expected, what came, what to do.

One row a mistake. Generators, parameters and the global param store are as before afterwards.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jaxtyping
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import constraints

from pyro_aevb import AutoAmortizedFlow, AutoAmortizedMultivariateNormal, AutoAmortizedNormal
from pyro_aevb.errors import AEVBError, DataError, GuideError, ModelError, SettingError
from pyro_aevb.guides.base import AmortizedGuide

X = torch.randn(12, 3)
NAN_IN_ROW_2 = torch.where(torch.arange(36).reshape(12, 3) == 7, torch.nan, X)
Batch = tuple[Any, ...]


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=x)


def discrete(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
        z = pyro.sample("z", dist.Normal(c.float(), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)


def two_plates(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("users", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)
    with pyro.plate("items", len(y)):
        v = pyro.sample("v", dist.Normal(w, 1.0))
        pyro.sample("y", dist.Normal(v, 1.0), obs=y)


def no_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(2), obs=x)


def loop_plate(x):
    for index in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{index}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{index}", dist.Normal(z, 1.0), obs=x[index, 0])


def volumes(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.reshape(-1, 1, 1, 1, 1), torch.ones(2, 4, 4, 4)).to_event(4), obs=x)


def steps(x):
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def widths(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def by_sign(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if (x[:, 0] > 0).all():
            z = z + pyro.sample("extra", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)


def by_sign_computed(x):
    """The same, of data that are computed, so that each batch is read by a run of the model."""
    by_sign(x + 0.0)


def from_run_to_run():
    """Return a model that has another site in every second run."""
    runs = [0]

    def alternating(x):
        runs[0] += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if runs[0] % 2:
                z = z + pyro.sample("extra", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)

    return alternating


def nested_support(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)


def split_mask(x, known):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(known).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def features(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("features", x.shape[1], dim=-1):
            weights = torch.arange(1.0, 1.0 + x.shape[1])
            pyro.sample("x", dist.Normal(z * weights, 1.0), obs=x)


def odd_support(x):
    class Odd(constraints.Constraint):
        event_dim = 0

        def check(self, value):
            return value > 0

    class Strange(dist.Gamma):
        support = Odd()

    with pyro.plate("data", len(x)):
        z = pyro.sample("z", Strange(1.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)


def nothing_observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


class Wrong(nn.Module):
    """An encoder that forgets the rows."""

    def forward(self, x):
        return x.sum()


@dataclass
class Case:
    """A mistake.

    Attributes:
        error: The exception.
        names: What its message must name, as a regular expression.
        model: The model.
        batch: The batch that the guide is built on.
        later: A batch that it is called with afterwards, where the mistake is there.
        settings: Arguments of the guide.
        kind: The guide.
    """

    error: type[AEVBError]
    names: str
    model: Callable[..., None] = model
    batch: Batch = (X,)
    later: Batch | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    kind: type[AmortizedGuide] = AutoAmortizedNormal


CASES = {
    # Models
    "discrete latent": Case(ModelError, r"'c' is discrete \(Categorical\).*[Ss]um it out.*TraceEnum_ELBO", discrete),
    "two plates that could be the rows": Case(
        ModelError,
        r"12 rows; 2 plates fit: \['items', 'users'\].*data_plate='\.\.\.'",
        two_plates,
        (X, torch.randn(12)),
    ),
    "no plate": Case(ModelError, "no plates.*data_plate=None", no_plate),
    "a plate of another name": Case(
        ModelError, r"no plate 'rows'.*'data' \(size 12\)", settings={"data_plate": "rows"}
    ),
    "rows in a Python loop": Case(ModelError, "'data' is a Python loop.*with pyro.plate", loop_plate, (X[:2],)),
    "an event that no encoder takes": Case(
        ModelError, r"events of shape \[2, 4, 4, 4\].*'x'.*encoder=module", volumes, (torch.randn(6, 2, 4, 4, 4),)
    ),
    "a support without a map": Case(ModelError, r"onto the support.*'z' \(Strange\).*biject_to", odd_support),
    "a mask inside a latent's event": Case(
        ModelError, r"'z' has shape \[12, 3\].*event of shape \[3\].*plate", split_mask, (X, X > 0)
    ),
    "nothing observed": Case(GuideError, r"no observation.*\['z'\]", nothing_observed),
    # Structures that change
    "a structure that depends on data": Case(
        ModelError,
        r"depends on the data.*\['extra'\].*which has z \[\].*second half, which has z \[\].*extra.*mask",
        by_sign,
        (torch.cat([-X[:6].abs(), X[6:].abs()]),),
    ),
    "a structure that changes from run to run": Case(
        ModelError, r"different sites.*'extra'.*poutine.mask", from_run_to_run()
    ),
    "a support that depends on a latent": Case(
        ModelError, r"support of latent site 'z' changes.*another latent.*upper \* u", nested_support
    ),
    "more latents than at the build": Case(
        ModelError, r"other sites.*got.*z_3.*pad to one length and mask", steps, later=(torch.randn(12, 4),)
    ),
    "fewer latents than at the build": Case(
        ModelError, r"other sites.*expected.*z_2.*got none of them.*mask", steps, later=(X[:, :2],)
    ),
    "latents of another width": Case(
        ModelError, r"expected .*z: \[3\].*got .*z: \[4\]", widths, later=(torch.randn(12, 4),)
    ),
    "another structure later": Case(
        ModelError,
        r"other sites.*extra",
        by_sign_computed,
        (-X.abs(),),
        later=(X.abs(),),
    ),
    "another size of a plate that is no set": Case(
        DataError, r"plate of 3 indices.*alike has 5.*mask", features, later=(torch.randn(12, 5),)
    ),
    # Batches
    "NaN that nothing masks": Case(
        DataError,
        "'x' hold 1 entries that are NaN",
        batch=(NAN_IN_ROW_2,),
    ),
    "no batch": Case(ModelError, "missing 1 required positional argument", batch=()),
    # Settings
    "an encoder for an unknown site": Case(
        GuideError, r"\['w'\].*inside the data plate 'data'.*\['z'\]", settings={"encoder": {"w": nn.Linear(3, 4)}}
    ),
    "an encoder that returns no features": Case(
        GuideError, r"Wrong must return \[12, .*x: \[12, 3\], got \[\]", settings={"encoder": Wrong()}
    ),
    "an encoder that takes other inputs": Case(GuideError, r"Linear.*\[12, 3\]", settings={"encoder": nn.Linear(5, 4)}),
    "an encoder that is no module": Case(
        SettingError, "encoder must be an nn.Module.*got function", settings={"encoder": lambda x: x}
    ),
    "encoders that are no modules": Case(SettingError, "encoder must be.*got str", settings={"encoder": {"z": "mlp"}}),
    "a misspelt global guide": Case(
        SettingError,
        r"\('normal', 'multivariate_normal', 'flow'\).*got 'gaussian'",
        settings={"global_guide": "gaussian"},
    ),
    "an initial scale of 0": Case(
        SettingError, "init_scale must be a positive number, got 0", settings={"init_scale": 0}
    ),
    "an initial scale below 0": Case(SettingError, "init_scale.*got -1.0", settings={"init_scale": -1.0}),
    "an initial scale that is no number": Case(
        SettingError, "init_scale.*got 'small'", settings={"init_scale": "small"}
    ),
    "an initial scale that is NaN": Case(SettingError, "init_scale.*got nan", settings={"init_scale": float("nan")}),
    "an initial scale without end": Case(SettingError, "init_scale.*got inf", settings={"init_scale": float("inf")}),
    "a flow that is none": Case(
        SettingError,
        "flow must make a Zuko flow.*Linear",
        kind=AutoAmortizedFlow,
        settings={"flow": lambda features, context: nn.Linear(features, context)},
    ),
}


@pytest.fixture(autouse=True)
def unchecked():
    """Run as users do, without the run-time check of annotations, which refuses some mistakes before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named_and_nothing_is_lost(name):
    case = CASES[name]
    pyro.param("mine", torch.tensor(3.0))
    guide = None if case.later is None else case.kind(case.model, **case.settings).build(*case.batch)
    generator = torch.get_rng_state()

    def make_it():
        if guide is not None:
            guide(*case.later)
        case.kind(case.model, **case.settings).build(*case.batch)

    with pytest.raises(case.error) as caught:
        make_it()

    assert type(caught.value) is case.error
    assert re.search(case.names, str(caught.value), re.DOTALL), str(caught.value)
    store = pyro.get_param_store()
    assert store["mine"] == 3.0
    assert guide is not None or list(store.keys()) == ["mine"]
    if not isinstance(caught.value, SettingError | GuideError) and guide is None:
        assert torch.equal(torch.get_rng_state(), generator)


QUESTIONS = {
    "explain": lambda guide: guide.explain(),
    "render": lambda guide: guide.render(),
    "built": lambda guide: guide.built,
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_to_a_guide_that_is_not_built_says_how_to_build_it(name):
    with pytest.raises(GuideError, match=r"not built yet.*build\(\*batch\)"):
        QUESTIONS[name](AutoAmortizedMultivariateNormal(model))


def test_a_failed_build_leaves_no_half_built_guide():
    guide = AutoAmortizedNormal(model, encoder=Wrong())
    for _ in range(2):
        with pytest.raises(GuideError, match="Wrong must return"):
            guide.build(X)
    with pytest.raises(GuideError, match="not built yet"):
        guide.explain()
    assert list(guide.parameters()) == []


def test_a_subset_of_encoders_is_no_mistake():
    def two(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w[..., None], torch.ones(3)).to_event(1), obs=x)

    guide = AutoAmortizedNormal(two, encoder={"z": nn.Linear(3, 4)}).build(X)
    assert set(guide(X)) == {"z", "w"}


def test_another_size_of_a_set_is_no_mistake():
    def groups(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("members", x.shape[1], dim=-1), poutine.mask(mask=torch.tensor(True)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(groups).build(X)
    assert guide(torch.randn(5, 9))["z"].shape == (5, 1)
