"""Inputs of any shape, type, layout, mask and scale: the right number, or an error of ours that says what is wrong.

Oracles are closed forms in double precision, and the same rows one by one.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pyro_aevb import AEVB, IWELBO, SGVB, AutoAmortizedNormal, LogDensity, fit
from pyro_aevb.errors import AEVBError, AEVBWarning, DataError, ModelError
from pyro_aevb.testing import GammaPoisson

FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
ONE = st.just(1.0)
EPSILON = {torch.float32: 1e-4, torch.float64: 1e-9}


class Normals(nn.Module):
    """Items of a row around a latent of its own: z ~ N(0, s^2), x_j ~ N(z, (s t)^2), of which a mask shows some.

    Args:
        scale: s.
        ratio: t.
        dtype: Of the latent.
    """

    def __init__(self, scale, ratio, dtype):
        super().__init__()
        self.scale, self.ratio, self.dtype = scale, ratio, dtype
        self.shift = nn.Parameter(torch.zeros((), dtype=dtype))

    def model(self, x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=self.dtype), self.scale))
            with pyro.plate("items", x.shape[1], dim=-2), pyro.poutine.mask(mask=seen.T):
                pyro.sample("x", dist.Normal(z, self.scale * self.ratio), obs=x.T)

    def guide(self, x, seen):
        mean, sd = self.posterior(x.detach(), seen)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean.to(self.dtype) + self.shift, sd.to(self.dtype)))

    def posterior(self, x, seen):
        """Return mean and standard deviation of z, in double precision."""
        precision = 1 + seen.sum(1).double() / self.ratio**2
        total = torch.where(seen, x.double(), 0.0).sum(1)
        return total / self.ratio**2 / precision, self.scale * precision.rsqrt()

    def log_marginal(self, x, seen):
        """Return log p of what is seen of each row: by p(x) = p(z) p(x | z) / p(z | x) at z = 0, in double precision."""
        mean, sd = self.posterior(x, seen)
        zero = torch.zeros((), dtype=torch.float64)
        items = dist.Normal(zero, self.scale * self.ratio).log_prob(x.double())
        prior = dist.Normal(zero, self.scale).log_prob(zero)
        return prior + torch.where(seen, items, 0.0).sum(1) - dist.Normal(mean, sd).log_prob(zero)


def strided(x):
    wide = x.new_zeros(2 * len(x), 3 * x.shape[1])
    wide[::2, ::3] = x
    return wide[::2, ::3]


def read_only(x):
    array = np.array(x.numpy())
    array.flags.writeable = False
    return array


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "strided": strided,
    "requires_grad": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "behind a graph": lambda x: x.clone().requires_grad_() * 1 if x.is_floating_point() else x,
    "parameter": lambda x: nn.Parameter(x.clone()) if x.is_floating_point() else x,
    "array": lambda x: x.numpy(),
    "fortran": lambda x: np.asfortranarray(x.numpy()),
    "backwards": lambda x: np.ascontiguousarray(x.numpy()[::-1, ::-1])[::-1, ::-1],
    "other byte order": lambda x: x.numpy().astype(x.numpy().dtype.newbyteorder()),
    "read-only": read_only,
}


class Case(NamedTuple):
    """One draw of everything.

    Attributes:
        exact: The model.
        x: Its data, dense.
        seen: Its mask.
        layout: How data and mask are handed over.
    """

    exact: Normals
    x: torch.Tensor
    seen: torch.Tensor
    layout: str

    @property
    def batch(self):
        """The data as a user might give them."""
        return LAYOUTS[self.layout](self.x), LAYOUTS[self.layout](self.seen)


@st.composite
def cases(draw, scales=ONE, dtypes=(torch.float32, torch.float64), least_rows=1):
    rows, items = draw(st.integers(least_rows, 5)), draw(st.integers(1, 4))
    scale, ratio, dtype = draw(scales), draw(st.sampled_from([0.5, 1.0, 3.0])), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seen = torch.rand(rows, items, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    x = scale * torch.randn(rows, items, generator=generator, dtype=torch.float64)
    if not dtype.is_floating_point:
        x = (2 * x).round().clamp(0 if dtype in (torch.uint8, torch.bool) else -9, 9)
    latent = dtype if dtype.is_floating_point else torch.float32
    return Case(Normals(scale, ratio, latent), x.to(dtype), seen, draw(st.sampled_from(list(LAYOUTS))))


def assert_close(found, case, expected, rtol=None):
    """Hold numbers to double precision, rounded to the model's: what is too large for it is infinite there."""
    epsilon = rtol or EPSILON[case.exact.dtype]
    expected = expected.to(case.exact.dtype)
    torch.testing.assert_close(found.detach().to(expected), expected, rtol=epsilon, atol=epsilon)


class TestExactGuides:
    """At the exact posterior every bound is log p(x), whatever is drawn."""

    @given(case=cases(dtypes=[torch.float32, torch.float64, torch.int64, torch.uint8]))
    @settings(max_examples=20, **FUZZ)
    def test_estimators_and_steps(self, case):
        exact, expected = case.exact, case.exact.log_marginal(case.x, case.seen)
        vi = AEVB(exact.model, exact.guide, SGVB(kl="sampled"))
        assert_close(vi.log_marginal(*case.batch, num_samples=100, seed=0, progress=False).value, case, expected, 1e-4)
        assert_close(vi.embed(*case.batch)["z"], case, exact.posterior(case.x, case.seen)[0])
        draws = vi.posterior(*case.batch, num_samples=200, seed=1)["z"]
        mean, sd = exact.posterior(case.x, case.seen)
        assert draws.dtype == exact.dtype
        assert ((draws.double().mean(0) - mean) / sd).abs().max() < 6 / 200**0.5
        step = vi.partial_fit(*case.batch, learning_rate=1e-9, seed=2)
        assert step == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-3)

    @given(case=cases(dtypes=[torch.bool]))
    @settings(max_examples=5, **FUZZ)
    def test_flags_are_no_numbers(self, case):
        vi = AEVB(case.exact.model, case.exact.guide)
        for door in (vi.partial_fit, vi.posterior, vi.embed, vi.log_marginal):
            with pytest.raises(ModelError, match=r"0: bool .*\.float\(\)"):
                door(*case.batch)

    @given(case=cases())
    @settings(max_examples=40, **FUZZ)
    def test_bounds(self, case):
        expected = case.exact.log_marginal(case.x, case.seen)
        for objective in (SGVB(2, kl="sampled"), IWELBO(3)):
            bounds = objective.bounds(case.exact.model, case.exact.guide, case.x, case.seen)
            assert_close(bounds.local, case, expected)

    @given(case=cases())
    @settings(max_examples=40, **FUZZ)
    def test_densities(self, case):
        density = LogDensity(case.exact.model, case.x, case.seen)
        mean, sd = case.exact.posterior(case.x, case.seen)
        z = (mean + sd)[:, None].to(case.exact.dtype)
        weight = density.log_joint(z).double() - dist.Normal(mean, sd).log_prob(z[:, 0].double())
        assert_close(weight, case, case.exact.log_marginal(case.x, case.seen))


class TestScales:
    """From 1e-30 to 1e30, where squares leave single precision: the number of double precision, or an error."""

    scales = st.integers(-30, 30).map(lambda power: 10.0**power)

    @given(case=cases(scales=scales))
    @settings(max_examples=40, **FUZZ)
    def test_never_a_wrong_number(self, case):
        exact, expected = case.exact, case.exact.log_marginal(case.x, case.seen)
        vi = AEVB(exact.model, exact.guide, SGVB(kl="sampled"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AEVBWarning)
            try:
                found = vi.log_marginal(*case.batch, num_samples=100, seed=0, progress=False)
                step = vi.partial_fit(*case.batch, learning_rate=1e-40, seed=2)
            except AEVBError as error:
                assert exact.dtype == torch.float32
                assert abs(math.log10(exact.scale)) > 15, error  # noqa: PT017
                return
        assert_close(found.value, case, expected, 1e-4)
        if not math.isnan(step):  # a step that was skipped, and says so
            assert step == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-3)

    @given(power=st.integers(-30, 30), dtype=st.sampled_from([torch.float32, torch.float64]))
    @settings(max_examples=40, **FUZZ)
    def test_data_far_from_the_model(self, power, dtype):
        """Log densities are as low as -1e60, which single precision calls -inf, and nothing calls NaN."""
        exact = Normals(1.0, 1.0, dtype)
        x, seen = torch.full((3, 2), 10.0**power, dtype=dtype), torch.ones(3, 2, dtype=torch.bool)
        expected = exact.log_marginal(x, seen)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AEVBWarning)
                found = (
                    AEVB(exact.model, exact.guide).log_marginal(x, seen, num_samples=100, seed=0, progress=False).value
                )
        except AEVBError:
            assert power > 15
            return
        torch.testing.assert_close(found.double(), expected.to(dtype).double(), rtol=1e-4, atol=1e-3)

    @given(power=st.integers(-30, 30))
    @settings(max_examples=20, **FUZZ)
    def test_automatic_guides_standardise(self, power):
        """Inputs of any scale become features of scale 1, so that the guide of scaled rows is that of the rows."""

        def embedded(scale):
            def model(x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    unit = dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0)
                    scaled = dist.TransformedDistribution(unit, [dist.transforms.AffineTransform(0.0, scale)])
                    pyro.sample("x", scaled.to_event(1), obs=x)

            x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
            pyro.set_rng_seed(0)
            return AEVB(model).embed((x.double() * scale).float())["z"]

        try:
            found = embedded(10.0**power)
        except AEVBError:
            assert abs(power) > 15
            return
        torch.testing.assert_close(found, embedded(1.0), rtol=1e-3, atol=1e-3)


class TestRows:
    @given(case=cases(least_rows=0))
    @settings(max_examples=30, **FUZZ)
    def test_an_empty_batch_is_refused_by_every_door(self, case):
        case = case._replace(x=case.x[:0], seen=case.seen[:0])
        vi = AEVB(case.exact.model, case.exact.guide)
        doors = [vi.partial_fit, vi.posterior, vi.predict, vi.embed, vi.reconstruct, vi.log_marginal]
        for door in doors:
            with pytest.raises(DataError, match=r"no rows|at least one"):
                door(*case.batch)
        with pytest.raises(DataError, match="empty"):
            vi.fit(case.batch, progress=False)

    @given(
        rows=st.integers(1, 6),
        event=st.lists(st.integers(1, 3), max_size=2),
        items=st.none() | st.integers(1, 3),
        latent=st.integers(1, 3),
        has_global=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=8, **FUZZ)
    def test_rows_alone_are_those_of_the_batch(self, rows, event, items, latent, has_global, seed):
        """Models of any event, inner plate and number of latents, under a guide that builds itself."""

        def model(x):
            g = pyro.sample("g", dist.Normal(0.0, 1.0)) if has_global else 0.0
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1)).sum(-1) + g
                if items is None:
                    loc = z.reshape(*z.shape, *[1] * len(event)).expand(*z.shape, *event)
                    pyro.sample("x", dist.Normal(loc, 1.0).to_event(len(event)), obs=x)
                    return
                with pyro.plate("items", items, dim=-2):
                    pyro.sample(
                        "x",
                        dist.Normal(z, 1.0).expand([items, len(x)]) if z.dim() < 2 else dist.Normal(z, 1.0),
                        obs=x.T,
                    )

        shape = event if items is None else [items]
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, *shape, generator=generator)
        pyro.set_rng_seed(seed)
        vi = AEVB(model, num_data=100)
        whole = vi.embed(x)["z"]
        assert whole.shape == (rows, latent)
        assert vi.posterior(x, num_samples=3, seed=0)["z"].shape == (3, rows, latent)
        for row in range(rows):
            torch.testing.assert_close(vi.embed(x[row : row + 1])["z"][0], whole[row], rtol=1e-4, atol=1e-5)
        assert math.isfinite(vi.partial_fit(x))


class TestLayouts:
    @given(case=cases(dtypes=[torch.float32]), batch_size=st.integers(1, 5), tail=st.sampled_from(list(LAYOUTS)))
    @settings(max_examples=12, **FUZZ)
    def test_a_fit_does_not_depend_on_them(self, case, batch_size, tail):
        found = []
        for layout in ("contiguous", case.layout, tail):
            exact = Normals(case.exact.scale, case.exact.ratio, case.exact.dtype)
            data = case._replace(layout=layout).batch
            size = min(batch_size, len(case.x))
            fit(exact.model, exact.guide, SGVB(), data, num_epochs=2, batch_size=size, seed=0, progress=False)
            found.append(exact.shift.detach())
            assert all(item.grad is None for item in data if isinstance(item, torch.Tensor) and item.is_leaf)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


class TestCounts:
    @given(
        counts=st.lists(st.integers(0, 9) | st.integers(0, 100_000), min_size=1, max_size=5),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    @settings(max_examples=30, **FUZZ)
    def test_of_any_size(self, counts, dtype):
        exact, _ = GammaPoisson.fixture(dtype)
        x = torch.tensor(counts, dtype=dtype)[:, None]
        expected = exact.log_marginal(x.double())
        bounds = SGVB(kl="sampled").bounds(exact.model, exact.guide, x)
        # terms as large as lgamma(1e5), 1e6, cancel to some -10
        torch.testing.assert_close(
            bounds.local.double(), expected, rtol=1e-4, atol=1.0 if dtype == torch.float32 else 1e-6
        )

    @given(value=st.sampled_from([-1.0, 0.5, float("nan"), float("inf")]), place=st.integers(0, 4))
    @settings(max_examples=15, **FUZZ)
    def test_outside_the_support(self, value, place):
        exact, _ = GammaPoisson.fixture(torch.float32)
        x = torch.arange(5.0)[:, None]
        x[place] = value
        with pytest.raises(DataError, match=r"'x'|argument 0"):
            LogDensity(exact.model, x)
        with pytest.raises(DataError):
            AEVB(exact.model, AutoAmortizedNormal(exact.model)).partial_fit(x)

    @given(
        value=st.sampled_from([-1.0, 0.5, 7.0]), row=st.integers(0, 499), door=st.sampled_from(["fit", "log_marginal"])
    )
    @settings(max_examples=12, **FUZZ)
    def test_outside_the_support_in_any_row(self, value, row, door):
        """A Bernoulli of logit 0 gives 7 a log density of log 2 times a positive number: evidence that is none."""

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                logits = z[..., None].expand(*z.shape, 2)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        x = (torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) > 0).float()
        vi = AEVB(model)
        arguments = {
            "fit": {"num_epochs": 1, "progress": False},
            "log_marginal": {"num_samples": 100, "progress": False},
        }[door]
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore", AEVBWarning)
            patch.setattr("pyro_aevb.program.supports._ROWS_PER_RUN", 70)
            getattr(vi, door)(x, **arguments)
            x[row, 1] = value
            with pytest.raises(DataError, match=rf"'x'.*support.* rows \[{row}\]|fit its distribution Bernoulli"):
                getattr(vi, door)(x, **arguments)
