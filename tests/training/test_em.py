"""Monte Carlo EM: the maximum of the likelihood where it is known, chains that follow posteriors, what it refuses."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, constraints
from torch.utils.data import DataLoader

from pyro_aevb.errors import DataError, ModelError, NonFiniteError, ParameterError, SettingError
from pyro_aevb.testing import LinearGaussian
from pyro_aevb.training.em import MonteCarloEM


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class PCA(nn.Module):
    """Probabilistic PCA: x ~ N(W z + b, s^2 I)."""

    def __init__(self, observed: int = 6, latent: int = 2) -> None:
        super().__init__()
        i, j = torch.arange(float(observed)), torch.arange(float(latent))
        self.W = nn.Parameter(0.3 * torch.cos(i[:, None] * (j + 1)))
        self.b = nn.Parameter(torch.zeros(observed))
        self.log_s = nn.Parameter(torch.tensor(0.0))
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> None:
        self.modes.add(self.training)
        prior = dist.Normal(torch.zeros(self.W.shape[1]), torch.ones(self.W.shape[1])).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, self.log_s.exp()).to_event(1), obs=x)

    def covariance(self) -> Tensor:
        return (self.W @ self.W.T + (2 * self.log_s).exp() * torch.eye(len(self.b))).detach()


def simulated(rows: int) -> Tensor:
    return LinearGaussian.fixture()[0].simulate(rows, seed=1)[0]


def maximum_likelihood(x: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """Return W W' + s^2 I at the maximum, and W W', by eigenvectors (Tipping and Bishop 1999, eq. 7 and 8)."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    noise = values[:-latent].mean()
    W = vectors[:, -latent:] * (values[-latent:] - noise).sqrt()
    return W @ W.T + noise * torch.eye(len(values)), W @ W.T


def test_the_maximum_of_the_likelihood_is_found() -> None:
    x, model = simulated(300), PCA()
    covariance, loadings = maximum_likelihood(x, 2)
    best = MultivariateNormal(x.mean(0), covariance).log_prob(x).mean()
    at_start = MultivariateNormal(model.b.detach(), model.covariance()).log_prob(x).mean()
    result = MonteCarloEM(model).fit(x, num_epochs=20, batch_size=150, learning_rate=0.25, seed=0, progress=False)
    found = MultivariateNormal(model.b.detach(), model.covariance()).log_prob(x).mean()
    assert at_start < best - 1
    assert best - 0.05 < found <= best
    # up to rotation of z
    assert (model.W @ model.W.T - loadings).norm() < 0.2 * loadings.norm()
    assert result.num_steps == 40
    assert result.num_updates == 200


def test_chains_follow_the_posterior_where_parameters_stand_still() -> None:
    """Whitened by the exact posterior they are standard normal, one draw a row, and log p(x, z) has the mean that follows."""
    fixture, x = LinearGaussian.fixture()[0], simulated(1500)
    model = PCA(6, 3)
    with torch.no_grad():
        model.W.copy_(fixture.weight)
        model.b.copy_(fixture.bias)
        model.log_s.fill_(0.5 * torch.tensor(0.25).log())
    em = MonteCarloEM(model, num_weight_updates=1)
    result = em.fit(x, num_epochs=40, batch_size=1500, learning_rate=1e-14, seed=0, progress=False)
    posterior = fixture.posterior(x)["z"]
    whitened = torch.linalg.solve_triangular(
        posterior.scale_tril, (result.chains - posterior.mean)[..., None], upper=False
    )[..., 0]
    error = 1500**-0.5
    assert (whitened.mean(0).abs() < 4 * error).all()
    assert ((torch.cov(whitened.T) - torch.eye(3)).abs() < 4 * 2**0.5 * error).all()

    last = result.history[-10:]
    assert sum(record["acceptance"] for record in last) / 10 == pytest.approx(0.9, abs=0.02)
    expected = (fixture.log_marginal(x) - posterior.entropy()).mean().item()
    found = [record["log_joint"] for record in result.history[-20:]]
    # a row's log joint has variance 3/2 given x
    assert sum(found) / 20 == pytest.approx(expected, abs=4 * (1.5 / 1500) ** 0.5)


def test_a_batch_stands_for_the_data_set_beside_what_lies_outside_the_plate() -> None:
    """x ~ N(loc, 2) with a penalty as strong as the data: the best loc is half their mean."""
    torch.manual_seed(1)
    x = 3.0 + 2**0.5 * torch.randn(200)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.factor("penalty", -0.5 * (200 / 2) * loc**2)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    MonteCarloEM(model, num_leapfrog=3).fit(x, num_epochs=12, batch_size=50, learning_rate=0.4, seed=0, progress=False)
    assert pyro.param("loc").item() == pytest.approx(x.mean().item() / 2, abs=0.15)


def test_latents_on_a_support_and_keyword_data() -> None:
    """Counts of Poisson with Gamma(2, b) rates are negative binomial, and the best b is 2 / mean."""
    torch.manual_seed(1)
    counts = torch.poisson(torch.distributions.Gamma(2.0, 1.5).sample((300,)))

    def model(*, x: Tensor) -> None:
        b = pyro.param("b", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), b))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    em = MonteCarloEM(model, num_leapfrog=5, data_plate="data")
    result = em.fit({"x": counts.numpy()}, num_epochs=15, batch_size=100, learning_rate=0.3, seed=0, progress=False)
    assert pyro.param("b").item() == pytest.approx(2 / counts.mean().item(), rel=0.12)
    assert result.chains.shape == (300, 1)


def test_modes_history_and_seed() -> None:
    x = simulated(30)
    results = []
    for _ in range(2):
        model = PCA().eval()
        results.append(MonteCarloEM(model).fit(x, num_epochs=2, batch_size=20, seed=4, progress=False))
        assert not model.training
        assert model.modes == {False, True}
    for one, other in zip(results[0].history, results[1].history, strict=True):
        assert {name: value for name, value in one.items() if name != "seconds"} == {
            name: value for name, value in other.items() if name != "seconds"
        }
    assert list(results[0].to_pandas().columns) == ["epoch", "log_joint", "acceptance", "step_size", "seconds"]
    assert "no bound" in repr(results[0])
    assert "4 steps, 20 updates" in repr(results[0])


def test_a_second_fit_goes_on_and_an_interrupt_keeps_the_state() -> None:
    x, calls = simulated(30), []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        calls.append([parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]])
        return optimizer

    def stop(parameters: Any) -> torch.optim.Optimizer:
        optimizer = make(parameters)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        optimizer.register_step_post_hook(interrupt)
        return optimizer

    model = PCA()
    em = MonteCarloEM(model, num_weight_updates=2)
    result = em.fit(x, num_epochs=3, batch_size=20, optimizer=stop, seed=0, progress=False)
    assert result.stopped_by == "interrupt"
    assert "no epoch finished" in repr(result)
    assert not torch.equal(model.W.detach(), calls[0][0])
    em.fit(x, num_epochs=1, optimizer=make, seed=0, progress=False)
    assert not torch.equal(calls[1][0], calls[0][0])


# Refusals


def test_globals_are_refused() -> None:
    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, pyro.param("s", torch.tensor(1.0))))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"global latents \['g'\]"):
        MonteCarloEM(model).fit(torch.zeros(3))


def test_a_model_that_draws_its_own_rows_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ModelError, match="no chain could follow a row"):
        MonteCarloEM(model).fit(torch.zeros(6))


def test_a_model_of_all_rows_gets_them() -> None:
    x = torch.tensor([0.3, -1.0, 2.0])

    def model(x: Tensor) -> None:
        slope = pyro.param("slope", torch.zeros(3))  # one a row
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(slope, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(SettingError, match="batch_size=3"):
        MonteCarloEM(model).fit(x, batch_size=2)
    assert MonteCarloEM(model).fit(x, num_epochs=1, progress=False).num_steps == 1


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ParameterError, match="no parameters"):
        MonteCarloEM(LinearGaussian.fixture()[0].model).fit(simulated(5))


def test_data_must_be_in_memory() -> None:
    with pytest.raises(DataError, match="all rows as tensors, got DataLoader"):
        MonteCarloEM(PCA()).fit(DataLoader(simulated(5)))
    with pytest.raises(DataError, match="NaN"):
        MonteCarloEM(PCA()).fit(torch.full((5, 6), torch.nan))


def test_diverging_parameters_are_told() -> None:
    optimizer = partial(torch.optim.SGD, lr=1e6)
    with pytest.raises(NonFiniteError, match="site 'x'") as caught:
        MonteCarloEM(PCA()).fit(simulated(50), num_epochs=5, optimizer=optimizer, seed=0, progress=False)
    assert caught.value.site == "x"


@pytest.mark.parametrize(
    "settings",
    [{"num_leapfrog": 0}, {"num_weight_updates": 0}, {"target_accept_prob": 1.0}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        MonteCarloEM(PCA(), **settings)


def test_settings_of_a_fit_out_of_range_are_refused() -> None:
    em, x = MonteCarloEM(PCA()), simulated(5)
    for settings in ({"learning_rate": 0.0}, {"num_epochs": 0}, {"batch_size": 6}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            em.fit(x, **settings)
    with pytest.raises(SettingError, match="default optimizer"):
        em.fit(x, optimizer=torch.optim.Adam, learning_rate=0.1)
