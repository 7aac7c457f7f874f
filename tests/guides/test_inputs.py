"""What networks read of observations: numpy as oracle for standardisation, hand-made masks and classes."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_aevb.errors import DataError, ModelError
from pyro_aevb.guides.inputs import Input, Observation, Scale, read_scale
from pyro_aevb.program.structure import Site


def site_of(fn, name="x"):
    family = fn
    while hasattr(family, "base_dist") and type(family).__name__ in ("Independent", "MaskedDistribution"):
        family = family.base_dist
    return Site(name, "observed", True, fn.support, tuple(fn.event_shape), (), (), type(family).__name__)


def make(value, mask=None, *, fn=None, event_shape=None):
    observation = Observation(value, mask)
    site = None if fn is None else site_of(fn)
    shape = tuple(value.shape[1:]) if event_shape is None else event_shape
    return Input("x", observation, read_scale(site, observation), shape)


@pytest.mark.parametrize(
    ("fn", "scale"),
    [
        (dist.Normal(torch.zeros(3), 1.0).to_event(1), Scale()),
        (dist.Normal(0.0, 1.0).mask(torch.tensor(True)), Scale()),
        (dist.Gamma(1.0, 1.0), Scale(is_positive=True)),
        (dist.Beta(1.0, 1.0), Scale(is_bounded=True)),
        (dist.ContinuousBernoulli(0.3), Scale(is_bounded=True)),
        (dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), Scale(is_bounded=True)),
        (dist.OneHotCategorical(torch.full((3,), 1 / 3)), Scale(is_bounded=True)),
        (dist.Poisson(torch.ones(3)).to_event(1), Scale(is_count=True)),
        (dist.NegativeBinomial(2.0, torch.tensor(0.5)), Scale(is_count=True)),
        (dist.Binomial(8, torch.tensor(0.5)), Scale(is_count=True)),
        (dist.Multinomial(8, torch.full((3,), 1 / 3)), Scale(is_count=True)),
        (dist.Categorical(torch.full((3, 4), 0.25)).to_event(1), Scale(num_classes=4)),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), Scale()),
    ],
    ids=lambda item: type(item).__name__ if not isinstance(item, Scale) else "",
)
def test_a_sites_support_says_how_it_is_read(fn, scale):
    found = read_scale(site_of(fn), Observation(fn.sample()[None], None))
    assert found == scale


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (torch.tensor([1.0, 2.0]), Scale()),
        (torch.tensor([True, False]), Scale(is_bounded=True)),
        (torch.tensor([0, 2, 1]), Scale(num_classes=3, has_number=True)),
        (torch.tensor([0, 99]), Scale(num_classes=100, has_number=True)),
        (torch.tensor([0, 100]), Scale(is_count=True)),
        (torch.tensor([-1, 2]), Scale()),
    ],
    ids=str,
)
def test_an_arguments_values_say_how_it_is_read(values, scale):
    assert read_scale(None, Observation(values[:, None], None)) == scale


def test_missing_entries_do_not_say_how_an_argument_is_read():
    values, mask = torch.tensor([[3], [-1], [0]]), torch.tensor([[True], [False], [True]])
    assert read_scale(None, Observation(values, mask)) == Scale(num_classes=4, has_number=True)


def test_numbers_are_standardised_by_their_own_mean_and_deviation():
    x = np.random.default_rng(0).normal(3.0, 5.0, (200, 4)).astype(np.float32)
    new = np.random.default_rng(1).normal(3.0, 5.0, (30, 4)).astype(np.float32)
    own = make(torch.as_tensor(x), fn=dist.Normal(torch.zeros(4), 1.0).to_event(1))
    value, mask = own(Observation(torch.as_tensor(new), None))
    np.testing.assert_allclose(value, (new - x.mean(0)) / x.std(0), rtol=1e-4, atol=1e-4)
    assert mask is None
    assert not own.has_mask


def test_inner_plates_share_mean_and_deviation():
    x = np.random.default_rng(0).normal(3.0, 5.0, (50, 6, 4)).astype(np.float32)
    own = make(torch.as_tensor(x), event_shape=(4,))
    np.testing.assert_allclose(own.mean, x.mean((0, 1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(own.deviation, x.std((0, 1)), rtol=1e-4)


def test_matrices_are_flat_and_images_stay_images():
    matrices, images = torch.randn(20, 3, 5), torch.randn(20, 2, 8, 8)
    assert make(matrices).event_shape == (15,)
    assert make(matrices)(Observation(matrices[:7], None)).value.shape == (7, 15)
    own = make(images)
    assert own.is_image
    assert own(Observation(images[:7], None)).value.shape == (7, 2, 8, 8)
    np.testing.assert_allclose(own.mean, images.mean(0), atol=1e-5)


def test_missing_entries_are_left_out_of_the_moments_and_read_as_zero():
    rng = np.random.default_rng(0)
    x, seen = rng.normal(3.0, 5.0, (200, 4)).astype(np.float32), rng.random((200, 4)) < 0.6
    x[~seen] = np.nan
    own = make(torch.as_tensor(x), torch.as_tensor(seen), event_shape=(4,))
    assert own.has_mask
    np.testing.assert_allclose(own.mean, np.nanmean(x, 0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(own.deviation, np.nanstd(x, 0), rtol=1e-4)
    value, mask = own(Observation(torch.as_tensor(x), torch.as_tensor(seen)))
    expected = np.where(seen, (x - np.nanmean(x, 0)) / np.nanstd(x, 0), 0.0)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(mask, seen)


def test_a_batch_without_a_mask_is_all_known_to_an_input_that_has_one():
    x = torch.randn(10, 4)
    own = make(x, x > -1.0)
    value, mask = own(Observation(x, None))
    assert mask.all()
    assert mask.shape == value.shape


def test_a_column_that_is_never_seen_is_zero_and_finite():
    x, seen = torch.full((6, 2), torch.nan), torch.zeros(6, 2, dtype=torch.bool)
    x[:, 0], seen[:, 0] = torch.arange(6.0), True
    value, _ = make(x, seen)(Observation(x, seen))
    assert value.isfinite().all()
    assert (value[:, 1] == 0).all()


def test_counts_are_read_by_their_logarithm():
    counts = np.random.default_rng(0).poisson(30.0, (200, 3)).astype(np.float32)
    own = make(torch.as_tensor(counts), fn=dist.Poisson(torch.ones(3)).to_event(1))
    logs = np.log1p(counts)
    value = own(Observation(torch.as_tensor(counts), None)).value
    np.testing.assert_allclose(value, (logs - logs.mean(0)) / logs.std(0), rtol=1e-3, atol=1e-3)


def test_the_deviation_of_bounded_data_has_a_floor():
    """A pixel that is on in one row of a hundred has a deviation of .1 and is an input of 4 when it is on."""
    pixels = torch.zeros(100, 2)
    pixels[0, 0] = 1.0
    own = make(pixels, fn=dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
    assert own.deviation.tolist() == [0.25, 0.25]
    assert own(Observation(torch.ones(1, 2), None)).value[0].tolist() == pytest.approx([3.96, 4.0])


def test_constants_are_not_blown_up():
    x = torch.full((50, 2), 7.0)
    x[:, 1] = torch.linspace(0, 1e-3, 50)
    own = make(x)
    value = own(Observation(x, None)).value
    assert own.deviation[0] == 1.0
    assert (value[:, 0] == 0).all()
    assert value[:, 1].std().item() == pytest.approx(1.0, abs=0.02)


def test_outliers_are_cut_at_ten_deviations():
    own = make(torch.randn(100, 1))
    value = own(Observation(torch.tensor([[1e6], [-1e6], [0.5]]), None)).value
    assert value[:2, 0].tolist() == [10.0, -10.0]
    assert abs(value[2, 0]) < 1.5


def test_positive_numbers_are_read_by_their_logarithm_and_with_zeros_by_that_of_one_more():
    numbers = np.random.default_rng(0).lognormal(3.0, 2.0, (200, 2)).astype(np.float32)
    fn = dist.LogNormal(torch.zeros(2), 1.0).to_event(1)
    logs = np.log(numbers)
    own = make(torch.as_tensor(numbers), fn=fn)
    value = own(Observation(torch.as_tensor(numbers), None)).value
    np.testing.assert_allclose(value, (logs - logs.mean(0)) / logs.std(0), rtol=1e-3, atol=1e-3)
    assert own(Observation(torch.zeros(1, 2), None)).value.isfinite().all()  # a filler under a mask
    numbers[0] = 0.0
    logs = np.log1p(numbers)
    value = make(torch.as_tensor(numbers), fn=fn)(Observation(torch.as_tensor(numbers), None)).value
    np.testing.assert_allclose(value, (logs - logs.mean(0)) / logs.std(0), rtol=1e-3, atol=1e-3)


def test_classes_are_one_input_each_and_an_unknown_class_is_none_of_them():
    labels = torch.tensor([[0], [2], [1], [2]])
    own = make(labels, fn=dist.Categorical(torch.full((1, 3), 1 / 3)).to_event(1))
    assert own.event_shape == (3,)
    shares = np.array([0.25, 0.25, 0.5])
    deviation = np.maximum(np.sqrt(shares * (1 - shares)), 0.25)
    value = own(Observation(torch.tensor([[2], [5]]), None)).value
    np.testing.assert_allclose(value[0], (np.array([0, 0, 1]) - shares) / deviation, rtol=1e-5)
    np.testing.assert_allclose(value[1], -shares / deviation, rtol=1e-5)


def test_classes_of_an_argument_are_read_as_a_number_too():
    labels = torch.tensor([[0], [2], [1], [2]])
    own = make(labels, event_shape=(1,))
    assert (own.event_shape, own.given_shape) == ((4,), (1, 4))
    third, unknown = own(Observation(torch.tensor([[2], [5]]), None)).value
    deviation = np.std([0, 2, 1, 2])
    assert third[3].item() == pytest.approx((2 - 1.25) / deviation)
    assert unknown[3].item() == pytest.approx((5 - 1.25) / deviation)
    assert unknown[:3].tolist() != third[:3].tolist()


def test_small_images_are_vectors():
    assert not make(torch.randn(20, 2, 3, 8)).is_image
    assert make(torch.randn(20, 2, 4, 4)).is_image


def test_a_mask_that_the_example_lacked_is_refused():
    x = torch.randn(10, 4)
    with pytest.raises(DataError, match=r"'x' are masked or NaN.*none were.*guide.build") as caught:
        make(x)(Observation(x, x > 0))
    assert caught.value.site == "x"


def test_a_missing_class_is_masked_in_each_of_its_inputs():
    labels, seen = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, False], [True, True]])
    own = make(labels, seen, fn=dist.Categorical(torch.full((2, 3), 1 / 3)).to_event(1))
    value, mask = own(Observation(labels, seen))
    assert value.shape == (2, 6)
    assert mask[0].tolist() == [True, True, True, False, False, False]
    assert (value[0, 3:] == 0).all()


def test_buffers_are_saved_and_values_take_the_default_type():
    own = make(torch.arange(12).reshape(4, 3) * 100)
    assert set(own.state_dict()) == {"mean", "deviation"}
    assert own(Observation(torch.arange(3)[None], None)).value.dtype == torch.get_default_dtype()
    assert make(torch.randn(4, 3).double()).mean.dtype == torch.float64


def test_an_event_of_too_many_dimensions_is_refused_by_its_shape():
    with pytest.raises(ModelError, match=r"\[2, 3, 4, 5\].*'x'.*encoder=module") as caught:
        make(torch.zeros(2, 2, 3, 4, 5))
    assert caught.value.site == "x"
