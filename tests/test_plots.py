"""Pictures show the data they were given, in the right place."""

import math

import matplotlib
import numpy as np
import pytest
import torch

from pyro_aevb.errors import DataError
from pyro_aevb.evidence.averages import from_log_weights
from pyro_aevb.plots import (
    plot_embedding,
    plot_history,
    plot_images,
    plot_imputations,
    plot_log_marginal,
    plot_manifold,
    plot_reconstructions,
)
from pyro_aevb.training.loop import FitResult


def fit_result(num_epochs, *, validation=True):
    records = [{"epoch": float(epoch), "bound": -30.0 - 9.0 / epoch} for epoch in range(1, num_epochs + 1)]
    for record in records if validation else ():
        record["validation_bound"] = record["bound"] - 1.0
    return FitResult(history=records)


def canvas(figure):
    (image,) = figure.axes[0].images
    return np.ma.filled(image.get_array(), np.nan)


def tile(picture, line, column, height, width):
    """Cut one image out of a grid whose images are one pixel apart."""
    top, left = line * (height + 1), column * (width + 1)
    return torch.from_numpy(picture[top : top + height, left : left + width])


def test_history_shows_both_bounds():
    result = fit_result(5)
    lines = plot_history(result).axes[0].lines
    assert len(lines) == 2
    for line, name in zip(lines, ("bound", "validation_bound"), strict=True):
        assert line.get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert line.get_ydata().tolist() == [record[name] for record in result.history]


def test_history_names_its_unit_and_the_last_bounds():
    ax = plot_history(fit_result(9)).axes[0]
    assert "nats per row" in ax.get_ylabel()
    title = ax.get_title(loc="left")
    assert "−31.00" in title
    assert "−32.00" in title


def test_history_without_validation_is_one_line():
    ax = plot_history(fit_result(5, validation=False)).axes[0]
    assert len(ax.lines) == 1
    assert "new" not in ax.get_title(loc="left")


@pytest.mark.parametrize(("num_epochs", "scale"), [(20, "linear"), (21, "log")])
def test_history_stretches_the_start_of_long_fits(num_epochs, scale):
    assert plot_history(fit_result(num_epochs)).axes[0].get_xscale() == scale


def test_history_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least one epoch"):
        plot_history(FitResult())


@pytest.mark.parametrize(("columns", "expected"), [(None, 3), (2, 2), (7, 7)])
def test_images_stand_in_order_one_pixel_apart(columns, expected):
    images = torch.rand(7, 4, 3)
    picture = canvas(plot_images(images, columns=columns))
    assert picture.shape == (math.ceil(7 / expected) * 5 - 1, expected * 4 - 1)
    for number, image in enumerate(images):
        torch.testing.assert_close(tile(picture, number // expected, number % expected, 4, 3), image)
    assert np.isnan(picture).sum() == picture.size - images.numel()


def test_images_may_bring_their_own_grid():
    images = torch.rand(2, 3, 4, 4)
    picture = canvas(plot_images(images))
    torch.testing.assert_close(tile(picture, 1, 2, 4, 4), images[1, 2])


@pytest.mark.parametrize("shape", [(5, 64), (0, 8, 8), (1, 2, 3, 4, 5)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match="Expected images of shape"):
        plot_images(torch.zeros(shape))


def test_reconstructions_stand_below_their_originals():
    originals, copies = torch.rand(5, 4, 4), torch.rand(2, 5, 4, 4)
    figure = plot_reconstructions(originals, copies)
    picture = canvas(figure)
    torch.testing.assert_close(tile(picture, 0, 3, 4, 4), originals[3])
    torch.testing.assert_close(tile(picture, 2, 3, 4, 4), copies[1, 3])
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["original", "reconstruction 1", "reconstruction 2"]


def test_one_reconstruction_needs_no_axis_of_draws():
    originals = torch.rand(5, 4, 4)
    assert canvas(plot_reconstructions(originals, originals, names=["seen", "made"])).shape == (9, 24)


@pytest.mark.parametrize(
    ("copies", "names", "message"),
    [((4, 4, 4), None, "Expected reconstructions"), ((5, 4, 4), ["only one"], "Expected 2 names")],
)
def test_reconstructions_that_do_not_fit_are_refused(copies, names, message):
    with pytest.raises(DataError, match=message):
        plot_reconstructions(torch.rand(5, 4, 4), torch.rand(copies), names=names)


def test_imputations_show_what_is_known_and_colour_the_rest():
    originals, draws = torch.rand(5, 4, 3), torch.rand(2, 5, 4, 3)
    observed = torch.rand(5, 4, 3) > 0.4
    ax = plot_imputations(originals, observed, draws).axes[0]
    grey, blue = (np.ma.filled(image.get_array().astype(float), np.nan) for image in ax.images)
    for column in range(5):
        torch.testing.assert_close(tile(grey, 0, column, 4, 3), originals[column].double(), check_dtype=False)
        torch.testing.assert_close(
            tile(grey, 1, column, 4, 3)[observed[column]], originals[column][observed[column]], check_dtype=False
        )
        assert torch.equal(tile(blue, 1, column, 4, 3).isnan(), observed[column])
        torch.testing.assert_close(tile(grey, 3, column, 4, 3), draws[1, column], check_dtype=False)
    assert np.isnan(blue[:4]).all()
    assert ax.get_ylim() == (4 * 5 - 1.5, -0.5)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["original", "known", "completion 1", "completion 2"]


def test_imputations_of_one_completion_and_what_does_not_fit():
    originals, observed = torch.rand(5, 4, 4), torch.ones(5, 4, 4).bool()
    ax = plot_imputations(originals, observed, originals).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["original", "known", "completion"]
    with pytest.raises(DataError, match="Expected observed of shape"):
        plot_imputations(originals, observed[:, :3], originals)
    with pytest.raises(DataError, match=r"got \[4, 4, 4\]"):
        plot_imputations(originals, observed, originals[:4])
    with pytest.raises(DataError, match="Expected 3 names"):
        plot_imputations(originals, observed, originals, names=["a", "b"])


def test_manifold_goes_through_the_inverse_normal_cdf():
    """Decode to the quantiles of the point: they are the centres of equal cells, the second latent upwards."""

    def decode(points):
        return torch.distributions.Normal(0.0, 1.0).cdf(points)

    picture = canvas(plot_manifold(decode, (1, 2), size=4))
    expected = torch.tensor([0.125, 0.375, 0.625, 0.875])
    for line in range(4):
        for column in range(4):
            point = tile(picture, line, column, 1, 2)[0]
            torch.testing.assert_close(point, torch.stack([expected[column], expected.flip(0)[line]]))


def test_manifold_labels_its_latents():
    ax = plot_manifold(lambda z: z[:, :1], (1, 1), size=5).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["−1.28", "−0.52", "0.00", "0.52", "1.28"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1.28", "0.52", "0.00", "−0.52", "−1.28"]


def test_embedding_has_a_colour_and_a_name_for_each_class():
    points, labels = torch.randn(30, 2), torch.arange(30) % 3
    ax = plot_embedding(points, labels).axes[0]
    assert len({tuple(part.get_facecolor()[0]) for part in ax.collections}) == 3
    for number, part in enumerate(ax.collections):
        torch.testing.assert_close(torch.from_numpy(np.asarray(part.get_offsets())).float(), points[labels == number])
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]


def test_embedding_without_labels_is_one_scatter():
    ax = plot_embedding(torch.randn(30, 2)).axes[0]
    assert len(ax.collections) == 1
    assert not ax.texts


@pytest.fixture
def weighed():
    """Forty rows; the weights of the last four have no variance, those of the first four no mean."""
    spread = torch.linspace(0.1, 0.6, 40)
    log_weights = torch.randn(1, 500, 40) * spread - torch.arange(40.0)
    log_weights[..., :4] += 3.0 * torch.distributions.Exponential(1.0).sample((1, 500, 4))
    return from_log_weights(log_weights)


def test_log_marginal_shows_every_row_sorted_and_marks_the_flagged(weighed):
    ax, below = plot_log_marginal(weighed).axes
    is_flagged = weighed.is_flagged
    assert 0 < int(is_flagged.sum()) < 40
    shown, flagged = ax.lines[0], ax.lines[1]
    assert sorted(flagged.get_ydata()) == sorted(weighed.value[is_flagged].tolist())
    assert list(shown.get_ydata()) == sorted(weighed.value[~is_flagged].tolist())
    assert sorted([*shown.get_xdata(), *flagged.get_xdata()]) == list(range(40))
    k_hat = np.concatenate([below.lines[0].get_ydata(), below.lines[1].get_ydata()])
    np.testing.assert_allclose(np.sort(k_hat), weighed.k_hat.sort().values)


def test_log_marginal_bars_are_one_standard_error(weighed):
    ax = plot_log_marginal(weighed).axes[0]
    (bars,) = ax.containers[0][2]
    order = weighed.value.argsort()
    order = order[~weighed.is_flagged[order]]
    half = [(segment[1, 1] - segment[0, 1]) / 2 for segment in bars.get_segments()]
    np.testing.assert_allclose(half, weighed.standard_error[order], rtol=1e-6)


def test_log_marginal_tells_the_mean_and_the_unit(weighed):
    ax = plot_log_marginal(weighed).axes[0]
    title = ax.get_title(loc="left")
    assert f"{weighed.value.mean():.2f}".replace("-", "−") in title
    assert f"{int(weighed.is_flagged.sum())} of them unreliable" in title
    assert ax.get_ylabel() == "log p(x) (nats)"


def test_log_marginal_without_k_hats_is_drawn():
    figure = plot_log_marginal(from_log_weights(torch.randn(1, 20, 5)))
    assert len(figure.axes[0].lines[0].get_ydata()) == 5


def test_pictures_leave_the_global_state_alone(tmp_path, weighed):
    before = dict(matplotlib.rcParams)
    plot_log_marginal(weighed).savefig(tmp_path / "weighed.png")
    plot_history(fit_result(30)).savefig(tmp_path / "history.svg")
    assert dict(matplotlib.rcParams) == before
    assert all(file.stat().st_size > 1000 for file in tmp_path.iterdir())
