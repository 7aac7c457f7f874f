"""Rows, names and draws that once met wrongly, each with the smallest program that showed it."""

import os
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from pyro_aevb import AEVB, SGVB, embed, fit, posterior, reconstruct
from pyro_aevb.errors import AEVBWarning, GuideError, ModelError
from pyro_aevb.program.objective_module import ObjectiveModule

QUIET = {"progress": False, "seed": 0}


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_guide(x):
    slope = pyro.param("slope", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 0.45))


def test_networks_are_found_in_one_order_in_every_process(tmp_path):
    """Equal shapes would load into each other if the order came from a set of names."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import torch, pyro, pyro.distributions as dist
        from pyro_aevb.program.reach import find_modules
        first, second, third = (torch.nn.Linear(3, 2) for _ in range(3))
        def guide(x):
            return first(x) + second(x) * third(x)
        print([[first, second, third].index(module) for module in find_modules(guide)])
        """)
    )
    environments = [os.environ | {"PYTHONHASHSEED": str(seed)} for seed in (1, 2, 3)]
    found = {subprocess.check_output([sys.executable, program], env=env, text=True) for env in environments}
    assert found == {"[0, 1, 2]\n"}


def test_an_automatic_guide_with_parameters_of_each_row_gets_all_rows_in_their_order():
    x = 1.5 * torch.randn(60)
    guide = AutoNormal(local_model)
    fit(local_model, guide, SGVB(), x, num_epochs=600, learning_rate=0.03, **QUIET)
    exact = x * 4 / 5
    assert (embed(local_model, guide, x)["z"] - exact).abs().max() < 0.3
    assert posterior(local_model, guide, x, num_samples=3)["z"].shape == (3, 60)


def test_an_automatic_guide_with_parameters_of_each_row_refuses_batches():
    x = torch.randn(60)
    with pytest.raises(GuideError, match=r"parameters of each row for sites \['z'\].*batch_size=60"):
        fit(local_model, AutoNormal(local_model), SGVB(), x, batch_size=20, **QUIET)
    with pytest.raises(GuideError, match="parameters of each row"):
        fit(local_model, AutoNormal(local_model), Trace_ELBO(), DataLoader(TensorDataset(x), 60, shuffle=True), **QUIET)


def test_a_second_fit_of_the_same_programs_replaces_their_values_in_the_store():
    x = torch.randn(200)
    fit(local_model, local_guide, SGVB(), x, num_epochs=1, **QUIET)
    result = fit(local_model, local_guide, SGVB(), x, num_epochs=60, learning_rate=0.02, **QUIET)
    trained = result.module.program.pyro_params()["slope"]
    assert torch.equal(pyro.param("slope").detach(), trained)
    assert abs(float(trained) - 0.8) < 0.1


def test_values_that_a_user_put_into_the_store_are_kept():
    pyro.param("slope", torch.tensor(7.0))
    with pytest.warns(AEVBWarning, match=r"\['slope'\] of something else"):
        fit(local_model, local_guide, SGVB(), torch.randn(50), num_epochs=1, **QUIET)
    assert float(pyro.param("slope").detach()) == 7.0


def test_values_that_a_user_changed_after_a_fit_are_kept():
    fit(local_model, local_guide, SGVB(), torch.randn(50), num_epochs=1, **QUIET)
    pyro.get_param_store()["slope"] = torch.tensor(7.0)
    with pytest.warns(AEVBWarning, match="something else"):
        fit(local_model, local_guide, SGVB(), torch.randn(50), num_epochs=1, **QUIET)
    assert float(pyro.param("slope").detach()) == 7.0


def test_score_refuses_sites_outside_the_plate_that_depend_on_rows():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        pyro.sample("total", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(6.0))

    x = torch.randn(4)
    with pytest.raises(ModelError, match="'total' lies outside the data plate but depends on latents inside"):
        SGVB(gradient="score").bounds(model, local_guide, x)
    assert torch.isfinite(SGVB().bounds(model, local_guide, x).local).all()


def test_a_guide_that_draws_other_rows_than_the_model_was_given_is_refused():
    data = torch.randn(100)

    def model(x, rows):
        with pyro.plate("data", 100, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, rows, subsample=None):
        with pyro.plate("data", 100, subsample_size=len(x), subsample=subsample):
            pyro.sample("z", dist.Normal(0.8 * x, 0.45))

    rows = torch.arange(10)
    with pytest.raises(GuideError, match=r"plate 'data' has subsample=\[0, 1, 2, 3, 4\].*same subsample="):
        SGVB().bounds(model, guide, data[rows], rows)
    right = SGVB().bounds(model, lambda x, rows: guide(x, rows, subsample=rows), data[rows], rows)
    assert right.scale == 10


@pytest.mark.parametrize("full_size", [None, 1000])
def test_validation_by_pyros_losses_counts_a_row_once(full_size):
    def model(x):
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))

    x = torch.randn(40)
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x).mean()  # the guide is the posterior, so each draw gives log p(x)
    for objective in (SGVB(kl="sampled"), Trace_ELBO()):
        module = ObjectiveModule(model, guide, objective).build(x)
        assert module.held_out_bound(x).item() == pytest.approx(exact.item(), abs=1e-4)
        assert module.held_out_bound(x[:7]).item() == pytest.approx(
            dist.Normal(0.0, 1.25**0.5).log_prob(x[:7]).mean().item(), abs=1e-4
        )


def test_a_loaders_sampler_says_how_many_rows_there_are():
    loader = DataLoader(TensorDataset(torch.randn(1000)), 20, sampler=SubsetRandomSampler(range(100)))
    vi = AEVB(local_model, local_guide)
    vi.fit(loader, num_epochs=1, **QUIET)
    assert vi.module.num_data == 100


def test_a_stream_that_passes_once_loses_no_batch():
    class Once(IterableDataset):
        def __init__(self):
            self.items = iter(torch.randn(50))

        def __iter__(self):
            return self.items

    result = AEVB(local_model, local_guide).fit(DataLoader(Once(), 10), num_epochs=1, **QUIET)
    assert result.num_steps == 5


def test_medians_of_folded_families_are_not_the_fold():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.HalfNormal(2.0).expand([len(x)]))

    assert torch.allclose(embed(model, guide, torch.ones(3))["z"], torch.tensor(1.34898), atol=1e-4)


def test_a_median_on_the_simplex_stays_there_and_a_family_without_mean_is_drawn():
    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Categorical(p), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).expand([len(x)]))

    x = torch.tensor([0, 1, 2, 2])
    assert torch.allclose(embed(model, guide, x)["p"].sum(-1), torch.ones(4))
    assert set(reconstruct(model, guide, x)["x"].tolist()) <= {0, 1, 2}


def test_ragged_chunks_of_a_sized_plate_with_a_global():
    def model(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        pyro.sample("g", dist.Normal(0.0, 0.1))
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 0.45))

    draws = posterior(model, guide, torch.randn(55), num_samples=4, chunk_size=50)
    assert draws["z"].shape == (4, 55)
    assert draws["g"].shape == (4,)
