"""The size of the whole data set reaches the data plate, whatever its form, and once only."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from staged_programs import OBJECTIVES, PROGRAMS

from pyro_aevb import SGVB
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.scaling import DataPlateScale, Shard
from pyro_aevb.program.staging import record
from pyro_aevb.training.staged import StagedLoss

NUM_DATA = 20
X = torch.linspace(-2.0, 2.0, NUM_DATA, dtype=torch.float64)
BATCH = X[3:8]


def forgotten(x):
    return pyro.plate("data", len(x)), x


def sized(x):
    return pyro.plate("data", NUM_DATA, subsample_size=len(x)), x


def given(x):
    return pyro.plate("data", NUM_DATA, subsample=torch.arange(len(x))), x


def with_inner_plate(x):
    return pyro.plate("data", len(x), dim=-2), x[:, None]


FORMS = [forgotten, sized, given, with_inner_plate]
LOC, SCALE = 0.3, 0.7


def programs(form):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        plate, x = form(x)
        with plate:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.new_tensor(LOC), SCALE))
        plate, _ = form(x)
        with plate:
            pass

    return model, guide


def by_hand(mean):
    """log p(mean) - log q(mean) + N / M * the sum over the batch (arXiv 1312.6114, Eq 8)."""
    outside = dist.Normal(0.0, 1.0).log_prob(mean) - dist.Normal(LOC, SCALE).log_prob(mean)
    return outside + NUM_DATA / len(BATCH) * dist.Normal(mean, 1.0).log_prob(BATCH).sum()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("objective", [Trace_ELBO, lambda: SGVB(kl="sampled")], ids=["Trace_ELBO", "SGVB"])
def test_the_loss_is_the_formula(form, objective):
    model, guide = programs(form)
    module = ObjectiveModule(model, guide, objective(), num_data=NUM_DATA).build(BATCH)
    pyro.set_rng_seed(1)
    loss = module(BATCH)
    pyro.set_rng_seed(1)
    mean = dist.Normal(BATCH.new_tensor(LOC), SCALE).rsample()
    torch.testing.assert_close(-loss, by_hand(mean))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_scale_of_a_site_is_set_once(form):
    model, _ = programs(form)
    with DataPlateScale("data", NUM_DATA):
        site = poutine.trace(model).get_trace(BATCH).nodes["x"]
    assert float(site["scale"]) == pytest.approx(NUM_DATA / len(BATCH))
    frame = next(frame for frame in site["cond_indep_stack"] if frame.name == "data")
    assert (frame.size, frame.full_size) == (len(BATCH), NUM_DATA)
    assert float(poutine.trace(model).get_trace(BATCH).nodes["mean"]["scale"]) == 1.0


def test_a_users_own_scale_is_multiplied():
    model, _ = programs(forgotten)
    with DataPlateScale("data", NUM_DATA):
        site = poutine.trace(poutine.scale(model, scale=0.5)).get_trace(BATCH).nodes["x"]
    assert float(site["scale"]) == pytest.approx(0.5 * NUM_DATA / len(BATCH))


def draws_its_own(x):
    with pyro.plate("data", NUM_DATA, subsample_size=5) as index:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[index])


def no_latents(x):
    with pyro.plate("data", NUM_DATA, subsample_size=5):
        pass


@pytest.mark.parametrize("objective", [Trace_ELBO, SGVB])
def test_a_model_that_draws_its_own_rows_has_its_scale(objective):
    module = ObjectiveModule(draws_its_own, no_latents, objective(), num_data=NUM_DATA).build(X)
    assert module.structure.draws_own_rows
    bounds = torch.stack([-module(X) for _ in range(400)])
    exact = dist.Normal(0.0, 1.0).log_prob(X).sum()
    standard_error = bounds.std() / len(bounds) ** 0.5
    assert abs(bounds.mean() - exact) < 4 * standard_error
    assert standard_error < 0.1 * abs(exact)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.float32, None), (torch.float64, None), (torch.float64, Shard(6, 10, 2))]
)
def test_a_recording_reads_the_number_of_rows(objective, dtype, shard):
    """As exactly as an eager run has it: N / M of float64 in a float64 model."""
    torch.set_default_dtype(dtype)
    model, guide = PROGRAMS["nn.Module"]()
    x = torch.randn(6, 4)
    module = ObjectiveModule(model, guide, objective(), num_data=60).build(x)
    loss = StagedLoss(module)
    with module.sharing(shard):
        graph = record(loss, x)
    assert graph is not loss
    for num_data in (60, 61, 10**9 + 7):
        module.num_data = num_data
        found = []
        for run in (loss, graph):
            pyro.set_rng_seed(1)
            with module.sharing(shard):
                found.append(torch.stack(run(x)).detach())
        torch.testing.assert_close(found[1], found[0], rtol=4 * torch.finfo(dtype).eps, atol=0.0)


def test_a_recording_reads_it_after_others_were_made_elsewhere():
    model, guide = PROGRAMS["nn.Module"]()
    x = torch.randn(6, 4)
    module = ObjectiveModule(model, guide, SGVB(), num_data=60).build(x)
    graph = record(module, x)
    module.to("meta")
    module.hold_num_data()
    module.num_data = 600
    assert [item.item() for item in graph.meta["outside"]] == [600.0]


def test_the_tensor_that_a_recording_reads_is_no_state():
    model, guide = PROGRAMS["nn.Module"]()
    module = ObjectiveModule(model, guide, SGVB(), num_data=60).build(torch.randn(6, 4))
    before, buffers = list(module.state_dict()), len(list(module.buffers()))
    record(module, torch.randn(6, 4))
    assert (list(module.state_dict()), len(list(module.buffers()))) == (before, buffers)


@pytest.mark.parametrize(("data_plate", "num_data"), [(None, NUM_DATA), ("data", None), ("other", NUM_DATA)])
def test_nothing_is_guessed(data_plate, num_data):
    model, _ = programs(forgotten)
    with DataPlateScale(data_plate, num_data):
        assert float(poutine.trace(model).get_trace(BATCH).nodes["x"]["scale"]) == 1.0
