"""Data outside the support of their likelihood are refused by every door that reads them, whatever form they come in."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_aevb import AEVB, export_posterior
from pyro_aevb.errors import AEVBWarning, DataError
from pyro_aevb.program.structure import read_structure
from pyro_aevb.program.supports import BatchSupports, check_supports

X = (torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) > 0).float()
SEVEN = X.clone()
SEVEN[33, 1] = 7.0
MISSING = X.clone()
MISSING[33, 1] = float("nan")
OUTSIDE = r"'x' lie outside the support.*\[\d\.0, 7\.0, \d\.0\]"


def model(x):
    """Flags of one latent."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z[..., None].expand(*z.shape, 3)).to_event(1), obs=x)


class Rows(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


FORMS = {
    "dataset": lambda x: TensorDataset(x),
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=10),
    "stream": lambda x: Rows(x),
    "iterator": lambda x: iter(x.split(10)),
}


def fitted(form, x, **settings):
    own = {"batch_size": 10} if form in ("dataset", "stream") else {}
    vi = AEVB(model)
    return vi.fit(FORMS[form](x), num_epochs=1, progress=False, **own, **settings), vi


class TestFit:
    @pytest.mark.parametrize("form", FORMS)
    def test_any_batch_is_looked_at(self, form):
        result, _ = fitted(form, X)
        assert result.num_steps == 4
        with pytest.raises(DataError, match=OUTSIDE):
            fitted(form, SEVEN)

    @pytest.mark.parametrize("form", FORMS)
    def test_missing_numbers_are_skipped_as_ever(self, form):
        with pytest.warns(AEVBWarning, match="1 of 4 steps were skipped"):
            result, _ = fitted(form, MISSING)
        assert (result.num_steps, result.num_skipped) == (3, 1)

    @pytest.mark.parametrize("settings", [{}, {"compile": False}])
    def test_a_step_on_rows_outside_leaves_everything_as_it_was(self, settings):
        """Also where Pyro's own checks are off, as they are in compiled steps."""
        vi = AEVB(model, num_data="growing", **settings)
        vi.partial_fit(X)
        before = [item.detach().clone() for item in vi.module.parameters()]
        generator = torch.get_rng_state()
        with pyro.validation_enabled(False), pytest.raises(DataError, match=OUTSIDE):
            vi.partial_fit(SEVEN)
        assert all(torch.equal(a, b) for a, b in zip(before, vi.module.parameters(), strict=True))
        assert torch.equal(generator, torch.get_rng_state())
        assert vi.module.num_data == 40

    @pytest.mark.slow
    def test_a_compiled_step_refuses_them_too(self):
        vi = AEVB(model, compile=True)
        vi.partial_fit(X)
        assert vi._stepper.execution.startswith("compiled")
        with pytest.raises(DataError, match=OUTSIDE):
            vi.partial_fit(SEVEN)


class TestInference:
    @pytest.mark.parametrize("door", ["posterior", "predict", "embed", "log_marginal"])
    def test_rows_outside_are_named(self, door):
        vi = AEVB(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AEVBWarning)
            getattr(vi, door)(X)
        with pytest.raises(DataError, match=OUTSIDE) as caught:
            getattr(vi, door)(SEVEN)
        assert "in rows [33]" in str(caught.value)

    def test_holes_may_be_filled_with_means_to_be_reconstructed(self):
        vi = AEVB(model)
        vi.embed(X)  # builds the guide, which looks at supports too
        found = vi.reconstruct(X.mean(0).expand_as(X))["x"]
        assert ((found > 0) & (found < 1)).all()

    def test_no_file_of_draws_is_written(self, tmp_path):
        vi = AEVB(model)
        vi.embed(X)
        with pytest.raises(DataError, match=r"rows \[33\]"):
            export_posterior(vi.model, vi.guide, SEVEN, path=tmp_path / "z.nc", num_samples=2)
        assert not list(tmp_path.iterdir())

    def test_a_template_may_hold_anything(self):
        vi = AEVB(model)
        vi.embed(X)
        assert vi.simulate(SEVEN, seed=0)["x"].shape == (40, 3)


class Counting:
    """A model that counts its runs."""

    def __init__(self, run):
        self.run, self.runs = run, 0

    def __call__(self, *args):
        self.runs += 1
        return self.run(*args)


def supports_of(run, *args):
    counting = Counting(run)
    structure = read_structure(counting, args)
    counting.runs = 0
    return BatchSupports(counting, structure), counting


class TestBatches:
    def test_arguments_that_are_observed_as_they_are_need_one_run_alone(self):
        supports, counting = supports_of(model, X)
        for _ in range(3):
            supports.check((X,), {})
        assert counting.runs == 1
        with pytest.raises(DataError, match=OUTSIDE):
            supports.check((SEVEN,), {})
        supports.check((X,), {})

    def test_what_is_computed_from_arguments_is_run_each_time(self):
        supports, counting = supports_of(lambda x: model(1 - x), X)
        for _ in range(3):
            supports.check((X,), {})
        assert counting.runs == 3
        with pytest.raises(DataError, match="'x' lie outside"):
            supports.check((SEVEN,), {})

    def test_what_is_masked_may_be_anything(self):
        def masked(x):
            with poutine.mask(mask=x[:, 1] < 2):
                model(x)

        supports, _ = supports_of(masked, X)
        for rows in (X, SEVEN, SEVEN):
            supports.check((rows,), {})

    def test_a_support_that_comes_with_the_batch_is_that_of_the_batch(self):
        def counts(x, total):
            with pyro.plate("data", len(x)):
                p = pyro.sample("p", dist.Beta(1.0, 1.0))
                pyro.sample("x", dist.Binomial(total, p), obs=x)

        three, nine = torch.full((4,), 3.0), torch.full((4,), 9.0)
        supports, _ = supports_of(counts, three, nine)
        supports.check((three, nine), {})
        supports.check((nine, nine), {})
        with pytest.raises(DataError, match="'x' lie outside"):
            supports.check((nine, three), {})

    def test_numbers_that_take_any_value_are_not_run(self):
        def normals(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        supports, counting = supports_of(normals, X[:, 0])
        supports.check((X[:, 0],), {})
        assert counting.runs == 0


def test_a_failure_behind_data_that_are_outside_does_not_hide_them():
    def fails(x):
        model(x)
        raise ValueError("behind the data")

    structure = read_structure(model, (X,))
    check_supports(fails, structure, (X,), {})  # runs that follow say what is wrong
    with pytest.raises(DataError, match=OUTSIDE):
        check_supports(fails, structure, (SEVEN,), {})


class TestManyRows:
    """A few rows tell what a model observes; all of them are held against its supports."""

    @pytest.mark.parametrize("change", [lambda x: x, lambda x: 1 - x], ids=["as they are", "computed"])
    @pytest.mark.parametrize("row", [33, 250, 12_345])
    def test_one_outside_is_named(self, change, row):
        x = torch.zeros(12_400, 3)
        structure = read_structure(model, (x[:9],))
        check_supports(lambda x: model(change(x)), structure, (x,), {})
        x[row, 1] = 7.0
        with pytest.raises(DataError, match=rf"in rows \[{row}\]"):
            check_supports(lambda x: model(change(x)), structure, (x,), {})

    def test_likelihoods_that_check_nothing_run_on_few(self):
        lengths = []

        def grey(x):
            lengths.append(len(x))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pixels = dist.Bernoulli(logits=z[..., None].expand(*z.shape, 3), validate_args=False)
                pyro.sample("x", pixels.to_event(1), obs=x)

        x = torch.rand(300, 3)
        structure = read_structure(grey, (x[:9],))
        lengths.clear()
        check_supports(grey, structure, (x,), {})
        assert lengths == [100]
