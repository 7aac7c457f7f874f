"""Rows at the door and in the result: numpy batches, a wrapper's own plate, rows selected from a result."""

import functools
import re
from dataclasses import replace

import pytest
import torch

from pyro_aevb import AEVB, log_marginal
from pyro_aevb.errors import DataError, SettingError
from pyro_aevb.evidence.averages import from_log_weights, joint_evidence
from pyro_aevb.evidence.bdmc import bdmc
from pyro_aevb.evidence.result import LogMarginal
from pyro_aevb.testing import LinearGaussian

quiet = functools.partial(log_marginal, progress=False, seed=0)


class TestBatches:
    @pytest.mark.parametrize("settings", [{"num_samples": 200}, {"method": "ais", "num_temperatures": 3}])
    def test_numpy_arrays_are_rows(self, settings):
        exact, x = LinearGaussian.fixture()
        result = quiet(exact.model, exact.guide, x.numpy(), **settings)
        assert torch.equal(result.value, quiet(exact.model, exact.guide, x, **settings).value)

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("ais", {"num_temperatures": 5}),
            pytest.param("bridge", {"num_chains": 2, "num_draws": 8, "warmup_steps": 4}, marks=pytest.mark.slow),
            ("quadrature", {}),
        ],
    )
    def test_other_rows_change_no_row(self, method, settings):
        exact, x = LinearGaussian.fixture()
        x = x + 0.3 * torch.randn(70, 6, dtype=x.dtype)
        few = quiet(exact.model, None, x[:2], method=method, **settings)
        for num_rows in (3, 70):
            more = quiet(exact.model, None, x[:num_rows], method=method, **settings)
            torch.testing.assert_close(more.value[:2], few.value, rtol=0, atol=1e-9)

    def test_numpy_arrays_are_templates(self):
        exact, x = LinearGaussian.fixture()
        settings = {"num_simulations": 3, "num_temperatures": 3, "seed": 0, "progress": False}
        result = bdmc(exact.model, None, x.numpy(), **settings)
        assert torch.equal(result.lower, bdmc(exact.model, None, x, **settings).lower)

    def test_a_wrapper_keeps_its_own_plate(self):
        exact, x = LinearGaussian.fixture()
        vi = AEVB(exact.model, exact.guide)
        with pytest.raises(SettingError, match=r"pyro_aevb.log_marginal\(vi.model, vi.guide, ..., data_plate=None\)"):
            vi.log_marginal(x, data_plate=None)
        assert quiet(vi.model, vi.guide, x, data_plate=None, num_samples=200).label == "joint log evidence"


class TestSelection:
    @pytest.fixture
    def result(self) -> LogMarginal:
        weights = torch.randn(1, 300, 6, generator=torch.Generator().manual_seed(0)).double()
        result = from_log_weights(weights * torch.tensor([0.1, 0.1, 4.0, 0.1, 4.0, 0.1]).double())
        joint = joint_evidence(torch.zeros(2), torch.ones(2, 6), torch.zeros(6), is_unbiased=True)
        return replace(result, acceptance=torch.arange(6).double(), joint=joint)

    @pytest.mark.parametrize(
        ("index", "places"),
        [
            (slice(1, 4), [1, 2, 3]),
            (slice(None, None, -1), [5, 4, 3, 2, 1, 0]),
            ([4, 0, 4], [4, 0, 4]),
            ((-1, 2), [5, 2]),
            (torch.tensor([3, 1]), [3, 1]),
            (torch.tensor([True, False, False, True, False, False]), [0, 3]),
            ([], []),
        ],
    )
    def test_every_entry_follows(self, result, index, places):
        part = result.rows(index)
        for name in ("value", "standard_error", "lower", "k_hat", "ess", "acceptance"):
            expected = getattr(result, name)[places]
            torch.testing.assert_close(getattr(part, name), expected, rtol=0, atol=0, equal_nan=True)
        assert part.status == tuple(result.status[place] for place in places)
        assert part.upper.shape == (len(places),)
        assert part.r_hat is None
        assert part.joint is None
        assert (part.method, part.num_samples, part.label) == (result.method, result.num_samples, result.label)

    def test_sound_rows_alone(self, result):
        sound = result.rows(~result.is_flagged)
        assert sound.summary().num_flagged == 0
        assert len(sound) == 6 - int(result.is_flagged.sum()) == 4

    @pytest.mark.parametrize(
        "index",
        [
            [6],
            [-7],
            torch.tensor([True, False]),
            torch.tensor([0.5]),
            torch.tensor(2),
            torch.zeros(1, 1, dtype=torch.long),
        ],
    )
    def test_an_index_that_does_not_fit_is_refused(self, result, index):
        with pytest.raises(DataError, match=re.escape("places from 0 to 5 in one axis or 6 booleans")):
            result.rows(index)
