"""What a fresh reader found wrong in the automatic guides, each mended and held here."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_aevb import SGVB, AutoAmortizedNormal
from pyro_aevb.errors import DataError, GuideError, ModelError
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.families import Diagonal
from pyro_aevb.testing import LinearGaussian


def shaken(guide):
    """Move every parameter off its start, where heads say nothing of their inputs."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def draw(guide, *batch):
    pyro.set_rng_seed(1)
    return {name: value.detach() for name, value in guide(*batch).items()}


def changed(guide, batch, other, site="z"):
    """Return which entries of a latent move when the batch does."""
    return (draw(guide, *batch)[site] - draw(guide, *other)[site]).abs() > 1e-6


class TestCovariatesAndPlates:
    def test_features_are_no_plate_because_their_number_is_the_plates_size(self):
        beta = torch.tensor([1.0, -2.0, 0.5])

        def model(x, w):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("items", 3, dim=-1):
                z = pyro.sample("z", dist.Normal((w * beta).sum(-1, keepdim=True), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x, w = torch.randn(20, 3), torch.randn(20, 3)
        guide = shaken(AutoAmortizedNormal(model).build(x, w))
        other = w.clone()
        other[0, 2] += 3.0
        moved = changed(guide, (x, w), (x, other))
        assert moved[0].all()
        assert not moved[1:].any()

    def test_a_transposed_covariate_of_square_plates_is_not_read_at_the_wrong_entry(self):
        def model(x, w):
            with pyro.plate("data", len(x), dim=-3), pyro.plate("a", 3, dim=-2), pyro.plate("b", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(w.transpose(1, 2), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x, w = torch.randn(10, 3, 3), torch.randn(10, 3, 3)
        guide = shaken(AutoAmortizedNormal(model).build(x, w))
        other = w.clone()
        other[0, 1, 2] += 3.0
        assert changed(guide, (x, w), (x, other))[0, 2, 1]

    def test_a_covariate_laid_out_along_the_plate_is_still_read_there(self):
        def model(x, w):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("items", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(2 * w, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x, w = torch.randn(20, 3), torch.randn(20, 3)
        guide = shaken(AutoAmortizedNormal(model).build(x, w))
        other = w.clone()
        other[0, 2] += 3.0
        moved = changed(guide, (x, w), (x, other))
        assert moved.sum() == 1
        assert moved[0, 2]

    def test_rows_taken_by_an_index_of_all_rows_take_their_covariates_along(self):
        def model(x, w, index):
            with pyro.plate("data", 20, subsample=index):
                z = pyro.sample("z", dist.Normal(w[index], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        torch.manual_seed(0)
        x, w, index = torch.randn(20), torch.randn(20), torch.randperm(20)
        guide = shaken(AutoAmortizedNormal(model).build(x, w, index))
        assert not guide.built.asymmetric
        other = w.clone()
        other[3] += 3.0
        assert changed(guide, (x, w, index), (x, other, index)).nonzero().flatten().tolist() == [
            index.tolist().index(3)
        ]
        assert draw(guide, x, w, index[:7])["z"].shape == (7,)

    def test_a_model_that_draws_rows_does_not_mark_their_places(self):
        def model(x, w):
            with pyro.plate("data", len(x), subsample_size=6) as index:
                z = pyro.sample("z", dist.Normal(w[index], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        assert not AutoAmortizedNormal(model).build(torch.randn(20), torch.randn(20)).built.asymmetric

    def test_covariates_of_a_subsampled_inner_plate_are_taken_by_its_index(self):
        def model(x, w):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("items", 50, subsample_size=5, dim=-1) as index:
                z = pyro.sample("z", dist.Normal(w[:, index], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])

        x, w = torch.randn(4, 50), torch.randn(4, 50)
        guide = shaken(AutoAmortizedNormal(model).build(x, w))
        pyro.set_rng_seed(1)
        index = poutine.trace(guide).get_trace(x, w).nodes["items"]["value"]
        other = w.clone()
        other[0, index[2]] += 3.0
        moved = changed(guide, (x, w), (x, other))
        assert moved[0, 2]
        assert moved.sum() == 1


class TestPlatesAsSets:
    def test_items_with_weights_of_their_own_are_told_apart_by_any_family(self):
        torch.manual_seed(0)
        weights = torch.randn(3, 2, 4)

        def model(x):
            with pyro.plate("data", len(x), dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                with pyro.plate("items", 3, dim=-1):
                    logits = torch.einsum("...ij,jkl->...kl", z.squeeze(-2)[..., None, :], weights.transpose(0, 1))
                    pyro.sample("x", dist.Multinomial(10, logits=logits.squeeze(-3)), obs=x)

        x = dist.Multinomial(10, logits=torch.zeros(20, 3, 4)).sample()
        assert AutoAmortizedNormal(model).build(x).built.asymmetric == {"items"}

    def test_an_ordered_plate_keeps_its_order_beside_another_plate(self):
        def model(x):
            with pyro.plate("data", len(x), dim=-3), pyro.plate("time", 5, dim=-1):
                step = pyro.sample("step", dist.Normal(0.0, 1.0))
                state = step.cumsum(-1)
                with pyro.plate("items", 3, dim=-2):
                    pyro.sample("x", dist.Normal(state, 1.0), obs=x)

        x = torch.randn(10, 3, 5)
        guide = shaken(AutoAmortizedNormal(model).build(x))
        other = torch.cat([x[..., :1], x[..., 1:].flip(-1)], -1)
        difference = (draw(guide, x)["step"] - draw(guide, other)["step"]).abs()
        assert difference[:, 0, 0].min() > 1e-3


class TestSteps:
    def test_numbers_in_names_do_not_give_unlike_latents_one_unit(self):
        def model(y):
            with pyro.plate("data", len(y)):
                k1 = pyro.sample("k1", dist.Normal(1000.0, 1.0))
                k2 = pyro.sample("k2", dist.Normal(0.0, 0.01))
                k3 = pyro.sample("k3", dist.Normal(-5.0, 30.0))
                for i, (k, s) in enumerate(((k1, 0.5), (k2, 0.005), (k3, 10.0)), start=1):
                    pyro.sample(f"y{i}", dist.Normal(k, s), obs=y[:, i - 1])

        y = torch.tensor([1000.0, 0.0, -5.0]) + torch.randn(50, 3) * torch.tensor([1.1, 0.011, 31.0])
        guide = AutoAmortizedNormal(model).build(y)
        assert [unit.latents for unit in guide.built.units] == [("k1",), ("k2",), ("k3",)]
        draws = draw(guide, y)
        assert (draws["k1"] - 1000).abs().max() < 5
        assert draws["k2"].abs().max() < 0.05

    def test_each_step_is_read_by_the_encoder_that_it_was_given(self):
        def chain(x):
            with pyro.plate("data", len(x)):
                z = torch.zeros(())
                for t in (1, 2, 3):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t - 1])

        class Own(nn.Module):
            calls = 0

            def forward(self, x):
                Own.calls += 1
                return torch.stack([x["x_2"], x["x_3"]], -1).flatten(1)

        guide = AutoAmortizedNormal(chain, encoder={"z_2": Own()}).build(torch.randn(20, 3))
        Own.calls = 0
        guide(torch.randn(4, 3))
        assert Own.calls == 1

    def test_a_number_that_changes_the_sites_is_seen(self):
        def model(x, steps):
            with pyro.plate("data", len(x)):
                z = torch.zeros(())
                for t in range(steps):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model).build(torch.randn(20), 3)
        with pytest.raises(ModelError, match="other sites than when the guide was built"):
            guide(torch.randn(20), 4)

    def test_a_latent_that_only_the_model_samples_is_refused_by_the_bound(self):
        count = [0]

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if count[0]:
                    pyro.sample("b", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model).build(torch.randn(20))
        count[0] = 1
        with pytest.raises(GuideError, match=r"'b'"):
            SGVB().bounds(model, guide, torch.randn(20))


class TestSupports:
    def test_a_number_that_moves_a_support_is_refused(self):
        def model(x, upper):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(0.0, upper))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model).build(torch.rand(20), 1.0)
        with pytest.raises(ModelError, match="support of latent site 'z'"):
            guide(torch.rand(20), 100.0)

    @pytest.mark.parametrize("upper", [torch.ones(20), torch.rand(20) + 1.0], ids=["constant", "of each row"])
    def test_a_tensor_of_ends_moves_the_guide(self, upper):
        def model(x, upper):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(0.0, upper))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model, init_scale=1.0).build(torch.rand(20), upper)
        z = draw(guide, torch.rand(20), torch.full((20,), 100.0))["z"]
        assert z.max() > 50
        assert z.max() < 100

    def test_a_mixture_as_prior_has_the_support_of_its_components(self):
        def model(x):
            with pyro.plate("data", len(x)):
                weights = dist.Categorical(torch.tensor([0.3, 0.7]))
                prior = dist.MixtureSameFamily(weights, dist.Normal(torch.tensor([-2.0, 2.0]), 0.5))
                z = pyro.sample("z", prior)
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x = torch.randn(20)
        assert SGVB().bounds(model, AutoAmortizedNormal(model).build(x), x).local.isfinite().all()


class TestScales:
    def test_a_model_in_float64_with_an_event_is_built_in_float64(self):
        exact, _ = LinearGaussian.fixture()
        x = exact.simulate(50, seed=1)[0]
        guide = AutoAmortizedNormal(exact.model).build(x)
        assert draw(guide, x)["z"].dtype == torch.float64
        assert all(parameter.dtype == torch.float64 for parameter in guide.parameters())

    def test_a_scale_that_was_driven_to_nothing_has_a_gradient_back(self):
        family = Diagonal(Coordinates((), (), torch.zeros(1), torch.ones(1)), 0.1)
        outputs = torch.tensor([0.0, -40.0], requires_grad=True)
        scale = family(outputs, dist.constraints.real).scale
        (gradient,) = torch.autograd.grad(scale.log().sum(), outputs)
        assert scale < 1e-5
        assert gradient[1] > 1e-3


class TestInputs:
    def test_positive_observations_are_read_by_their_logarithm(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 3.0))
                pyro.sample("x", dist.LogNormal(z, 0.1), obs=x)

        x = (3 * torch.randn(500)).exp()
        guide = AutoAmortizedNormal(model).build(x)
        inputs = guide.networks.of_locals.inputs[0]
        torch.testing.assert_close(inputs.mean, x.log().mean()[None])

    def test_a_class_that_the_example_lacks_is_not_like_any_other(self):
        def model(x, k):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(k.float(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        x, k = torch.randn(20), torch.arange(20) % 5
        guide = shaken(AutoAmortizedNormal(model).build(x, k))
        assert changed(guide, (x, torch.full((20,), 7)), (x, torch.full((20,), 9))).all()

    def test_small_images_are_vectors(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[:, None, None, None], 1.0).expand([len(x), 3, 1, 1]).to_event(3), obs=x)

        assert AutoAmortizedNormal(model).build(torch.randn(20, 3, 1, 1))

    def test_missing_entries_that_the_example_lacked_are_named(self):
        def model(x, mask=None):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with poutine.mask(mask=True if mask is None else mask):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model).build(torch.randn(20))
        with pytest.raises(DataError, match=r"'x' are masked.*guide\.build"):
            guide(torch.randn(20), torch.rand(20) > 0.5)

    def test_no_rows(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        guide = AutoAmortizedNormal(model).build(torch.randn(20))
        with pytest.raises(DataError, match="no rows"):
            guide(torch.randn(0))

    def test_a_tensor_without_rows_is_named(self):
        def model(x, w):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z[:, None] * w, 1.0).to_event(1), obs=x)

        with pytest.raises(DataError, match=r"'w' has 3 entries on axis 0.*functools\.partial"):
            AutoAmortizedNormal(model).build(torch.randn(20, 3), torch.ones(3))


class TestOwnEncoders:
    @staticmethod
    def rows(event):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                fn = dist.Normal(z.reshape(-1, *(1,) * len(event)), 1.0).expand([len(x), *event])
                pyro.sample("x", fn.to_event(len(event)), obs=x)

        return model

    def test_a_module_gets_the_event_as_the_model_has_it(self):
        seen = []

        class Own(nn.Module):
            def forward(self, x):
                seen.append(tuple(x.shape))
                return x.flatten(1)

        AutoAmortizedNormal(self.rows((5, 6)), encoder=Own()).build(torch.randn(20, 5, 6))
        assert seen == [(20, 5, 6)]

    def test_a_latent_in_a_plate_needs_features_of_each_index(self):
        def model(x):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("items", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(GuideError, match=r"must return \[20, 3, 'features'\] of x: \[20, 3\], got \[20, 8\]"):
            AutoAmortizedNormal(model, encoder=nn.Linear(3, 8)).build(torch.randn(20, 3))

    def test_a_module_that_fails_is_named_with_what_it_got(self):
        with pytest.raises(GuideError, match=r"encoder Linear failed on x: \[20, 4\]"):
            AutoAmortizedNormal(self.rows((4,)), encoder=nn.Linear(3, 8)).build(torch.randn(20, 4))
