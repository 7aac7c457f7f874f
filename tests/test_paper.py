"""The paper's figures: settings, grids, models and tables of `benchmarks.paper`, and all of it once in small."""

import importlib
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_aevb import AEVB, SGVB

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "benchmarks" / "paper"

needs_images = pytest.mark.skipif(
    not all((Path(os.environ.get("PYRO_AEVB_DATA", "")) / name).is_file() for name in ("mnist.npz", "freyface.npz")),
    reason="mnist.npz and freyface.npz are not on this machine; PYRO_AEVB_DATA names their directory",
)


@pytest.fixture(scope="module", autouse=True)
def _root() -> Iterator[None]:
    """Find the benchmarks, which are no installed package."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.paper.{name}")


def curve(**changes: Any) -> Any:
    settings = {"data": "mnist", "latent": 3, "method": "aevb", "hidden": 12, "num_train": 400}
    return part("settings").Curve(**{**settings, **changes})


def row(method: str, samples: int, bound: float, **changes: Any) -> dict[str, Any]:
    found = {"data": "mnist", "latent": 20, "method": method, "seed": 0, "initial_sd": 0.01, "samples": samples}
    return {**found, "test_bound": bound, "train_bound": bound + 1, "seconds": 1.0, "rate": 0.01, **changes}


def test_points_are_twelve_a_decade_and_powers_of_ten_are_among_them() -> None:
    due = part("settings").due
    points = [samples for samples in range(1_600, 10_000_001, 1_600) if due(samples, 1_600)]
    assert {100_800, 1_000_000} <= set(points)  # the first epochs that end at or after the powers
    for power in (4, 5, 6):
        assert len([samples for samples in points if 10**power <= samples < 10 ** (power + 1)]) == 12
    assert due(1_000_000, 50_000)
    assert not due(1_000, 500)


def test_every_first_parameter_is_normal_with_deviation_one_hundredth() -> None:
    make = part("models").make_vae
    for data, pixels in (("mnist", 784), ("frey", 560)):
        vae = make(curve(data=data, hidden=500), pixels)
        values = torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])
        assert abs(float(values.std()) - 0.01) < 4 * 0.01 / math.sqrt(2 * len(values))
        assert abs(float(values.mean())) < 4 * 0.01 / math.sqrt(len(values))
        biases = torch.cat([item.detach() for item in vae.parameters() if item.dim() == 1])
        assert biases.abs().min() > 0
        assert torch.equal(make(curve(data=data, hidden=500), pixels).encoder[0].weight, vae.encoder[0].weight)
        assert not torch.equal(
            make(curve(data=data, hidden=500, seed=1), pixels).encoder[0].weight, vae.encoder[0].weight
        )


@pytest.mark.parametrize(("encoder", "decoder"), [(0.0, 1.0), (0.5, 0.0)])
def test_the_prior_of_weights_pulls_matrices_and_leaves_biases_alone(encoder: float, decoder: float) -> None:
    vae = part("models").make_vae(curve(), 784)
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    make = part("curves").Adagrads(vae, 0.001, encoder_decay=encoder, decoder_decay=decoder)
    optimizer = make(vae.parameters())
    for parameter in vae.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in vae.named_parameters():
        # Adagrad divides the first gradient by its own size: what is left is the sum of its squares, the prior's gradient in it
        decay = (encoder if name.startswith("encoder") else decoder) * (parameter.dim() == 2)
        torch.testing.assert_close(optimizer.state[parameter]["sum"], (1 + decay * before[name]).square())
        torch.testing.assert_close(parameter.detach(), before[name] - 0.001, rtol=0, atol=1e-6)


def test_a_face_has_means_inside_the_unit_interval_and_deviations_above_the_floor() -> None:
    models = part("models")
    vae = models.FaceVAE(pixels=4, hidden=3, latent=2)
    with torch.no_grad():
        vae.decoder[2].bias.copy_(torch.tensor([-3.0, 0.0, 3.0, 9.0, -100.0, -100.0, 0.0, 2.0]))
        vae.decoder[2].weight.zero_()
        mean, scale = vae.decode(torch.zeros(1, 2))
    torch.testing.assert_close(mean, torch.tensor([[-3.0, 0.0, 3.0, 9.0]]).sigmoid())
    assert scale[0, :2].tolist() == [models.LEAST_SCALE] * 2
    torch.testing.assert_close(scale[0, 2:].square(), models.LEAST_SCALE**2 + torch.tensor([1.0, math.exp(2.0)]))


def test_bounds_of_curves_are_those_of_the_hand_written_autoencoder() -> None:
    vae = part("models").make_vae(curve(hidden=20, latent=4), 30)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(50)
    hand = importlib.import_module("benchmarks.peers").HandWrittenVAE(30, 20, 4)
    hand.load_state_dict(vae.state_dict())
    x = torch.rand(500, 30, generator=torch.manual_seed(0))
    ours = torch.tensor([part("curves").bound_of(vae, x, seed=seed) for seed in range(30)])
    with torch.no_grad():
        theirs = torch.stack([hand.bound(x).mean() for _ in range(30)])
    error = math.sqrt(float(ours.var() + theirs.var()) / 30)
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    assert error < 0.1
    assert part("curves").bound_of(vae, x, seed=3) == pytest.approx(float(ours[3]), rel=1e-6)


def test_what_the_encoder_tells_is_its_divergence_from_the_prior() -> None:
    vae = part("models").make_vae(curve(hidden=20, latent=4), 30)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(50)
    x = torch.rand(500, 30, generator=torch.manual_seed(0))
    with torch.no_grad():
        loc, log_variance = vae.encoder(x).chunk(2, -1)
        expected = kl_divergence(Normal(loc, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    assert part("curves").divergence_of(vae, x) == pytest.approx(float(expected), rel=1e-5)
    assert expected > 0.5


def test_evidence_belongs_to_the_weights_and_not_to_the_name_of_a_network(tmp_path: Path) -> None:
    """Rows that were weighed under other weights are not taken for those of a network trained anew."""
    evidence, write = part("evidence"), part("tables").write_table
    job, own = part("settings").Job(tmp_path, tmp_path, trains=False), curve()
    network = tmp_path / f"{own.name}_100.pt"
    vae = part("models").make_vae(own, 784)
    torch.save(vae.state_dict(), network)
    rows = [{"value": -1.0, "standard_error": 0.1, "is_flagged": 0}]
    write(evidence._path(job, network, "test", "bridge"), rows)
    assert evidence.weigh(job, own, 100, "test", "bridge", num_rows=1) == rows
    assert evidence.weigh(job, own, 100, "train", "bridge", num_rows=1) == []
    with torch.no_grad():
        vae.decoder[2].bias[3] += 1e-6
    torch.save(vae.state_dict(), network)
    assert evidence.weigh(job, own, 100, "test", "bridge", num_rows=1) == []


def test_the_best_bound_counts_up_to_the_samples_of_both() -> None:
    rows = [row("aevb", 100, -9.0), row("aevb", 200, -8.0), row("aevb", 300, -5.0), row("aevb", 200, -1.0, seed=1)]
    rows += [row("wake_sleep", 100, -7.0), row("wake_sleep", 200, -7.5), row("aevb", 300, -2.0, latent=3)]
    best = part("figure2").best_bounds(rows)
    assert best["mnist", 20, "aevb"] == (-8.0, 200)
    assert best["mnist", 20, "wake_sleep"] == (-7.0, 200)
    assert best["mnist", 3, "aevb"] == (-2.0, 300)
    assert part("figure2").best_bounds(rows, part="train")["mnist", 20, "aevb"] == (-7.0, 200)


def test_tables_come_back_and_new_rows_replace_old_ones_of_their_keys(tmp_path: Path) -> None:
    tables = part("tables")
    rows = [{"method": "aevb", "samples": 100, "bound": -123.4567}, {"method": "mcem", "samples": 5, "acceptance": 0.5}]
    tables.write_table(tmp_path / "a.csv", rows)
    assert tables.read_table(tmp_path / "a.csv") == [
        {"method": "aevb", "samples": 100, "bound": -123.4567, "acceptance": ""},
        {"method": "mcem", "samples": 5, "bound": "", "acceptance": 0.5},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    old, new = [row("aevb", 1, -1.0), row("aevb", 2, -2.0), row("mcem", 1, -3.0)], [row("aevb", 1, -9.0)]
    assert tables.merge(old, new, ("method",)) == [old[2], *new]
    assert tables.read_table(tmp_path / "none.csv") == []


def test_means_of_log_p_have_both_errors_and_differences_leave_flagged_rows_out() -> None:
    evidence = part("evidence")
    rows = [
        {"value": value, "standard_error": 0.3, "is_flagged": flag} for value, flag in ((-1.0, 0), (-3.0, 0), (-8.0, 1))
    ]
    summary = evidence.summarize(rows, 2)
    assert summary["mean"] == pytest.approx(-4.0)
    assert summary["monte_carlo_error"] == pytest.approx(math.sqrt(3 * 0.09) / 3)
    assert summary["rows_error"] == pytest.approx(math.sqrt(13.0 / 3))
    assert summary["flagged"] == 1
    assert (summary["mean_of_first"], summary["first"]) == (pytest.approx(-2.0), 2)
    exact = [{"value": value, "standard_error": 0.0, "is_flagged": 0} for value in (-1.5, -3.0, -3.0)]
    difference = evidence.compare(rows, exact)
    assert (difference["kept"], difference["difference"], difference["largest"]) == (2, pytest.approx(0.25), -5.0)
    assert difference["difference_all"] == pytest.approx(-1.5)
    assert difference["misses"] == 0
    sure = [{**entry, "standard_error": 0.1} for entry in rows]
    assert evidence.compare(sure, [{**entry, "value": entry["value"] + 0.45} for entry in exact])["misses"] == 0
    assert evidence.compare(sure, [{**entry, "value": entry["value"] + 0.55} for entry in exact])["misses"] == 1
    assert difference["monte_carlo_error"] == pytest.approx(math.sqrt(2 * 0.09) / 2)


def test_digits_are_drawn_anew_whenever_they_are_presented() -> None:
    grey, seen = torch.rand(200, 10, generator=torch.manual_seed(0)), []

    def model(x: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.0))
        seen.append(x.clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=(scale * z)[:, None].expand(-1, 10)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))

    settings = {"batch_size": 200, "compile": False, "seed": 0, "progress": False}
    AEVB(model, guide).fit(part("after").Rebinarized(grey), num_epochs=40, **settings)
    epochs = torch.stack([x.sum(0) for x in seen[-40:]])  # every epoch is one batch, in an order of its own
    assert len(epochs.unique(dim=0)) == 40
    expected, variance = grey.sum(0), (grey * (1 - grey)).sum(0)
    assert ((epochs.mean(0) - expected).abs() < 4.5 * (variance / 40).sqrt()).all()
    assert set(torch.cat(seen).unique().tolist()) == {0.0, 1.0}


def test_the_weights_posterior_enters_by_its_divergence_from_the_prior() -> None:
    vae = part("full_bayes").BayesianVAE(pixels=6, hidden=5, latent=2, num_data=50, seed=3)
    x = torch.rand(7, 6, generator=torch.manual_seed(0))
    bounds = SGVB().bounds(vae.model, vae.guide, x)
    expected = sum(
        float(kl_divergence(Normal(vae.locs[name], vae.log_scales[name].exp()), Normal(0.0, 1.0)).sum().detach())
        for name in ("w1", "b1", "w2", "b2")
    )
    assert float(bounds.global_) == pytest.approx(-expected, rel=1e-5)


def test_draws_of_the_weights_decode_as_each_draw_alone() -> None:
    layer = part("full_bayes")._layer
    weight, bias, x = torch.randn(4, 1, 3, 2), torch.randn(4, 1, 3), torch.randn(4, 6, 2)
    together = layer(x, weight, bias)
    for index in range(4):
        alone = layer(x[index], weight[index, 0], bias[index, 0])
        torch.testing.assert_close(together[index], alone)


def test_the_page_without_tables_says_so(tmp_path: Path) -> None:
    part("page").write(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("No run of this part is in the tables yet.") == 7


def test_the_page_tells_of_exceptions_and_of_partial_curves(tmp_path: Path) -> None:
    rows = [row("aevb", 1_000_000, -120.0), row("wake_sleep", 2_000_000, -119.0), row("wake_sleep", 900_000, -125.0)]
    rows += [row(method, 3_000_000, bound, latent=3) for method, bound in (("aevb", -140.0), ("wake_sleep", -139.0))]
    rows = [{**entry, "hidden": 500, "num_train": 50_000, "train_kl": 9.0, "least_scale": ""} for entry in rows]
    rows[2]["train_kl"] = 0.012  # of wake-sleep after 900,000 samples
    part("tables").write_table(tmp_path / "figure2.csv", rows)
    part("page").write(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "is above wake-sleep's in 1 of 2 panels" in page
    assert "- The exception: MNIST, N_z = 3, AEVB minus wake-sleep -1.0 (seed 0, 3,000,000 samples)." in page
    assert "tell less than 0.1 nats of a row: N_z = 20 and awake later, 900,000 samples." in page
    assert "AEVB's encoders tell 9.0 nats and more from 100,000 samples on." in page
    assert "- The first million samples of MNIST by AEVB took 1 to 1 s" in page
    assert "| MNIST, N_z = 20 | 1,000,000 (partial) | -120.0 (-119.0) | -125.0 (-124.0) | +5.0 |" in page
    assert "| MNIST, N_z = 3 | 3,000,000 | -140.0 (-139.0) | -139.0 (-138.0) | -1.0 |" in page


def test_the_page_tells_of_seeds_and_of_latents_that_stay_dead(tmp_path: Path) -> None:
    rows = [
        {
            **row(method, 3_000_000, bound + 3 * seed, data="frey", latent=5, seed=seed),
            "hidden": 200,
            "num_train": 1_600,
        }
        for seed in (0, 1)
        for method, bound in (("aevb", 700.0 + seed), ("wake_sleep", 577.0))
    ]
    rows = [{**entry, "train_kl": 8.0 if entry["method"] == "aevb" else 0.003, "least_scale": 0.0039} for entry in rows]
    part("tables").write_table(tmp_path / "figure2.csv", rows)
    part("page").write(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    gaps = "AEVB minus wake-sleep +123.0 (seed 0, 3,000,000 samples), +124.0 (seed 1, 3,000,000 samples)."
    assert f"- By seed: Frey Face, N_z = 5, {gaps}" in page
    assert "N_z = 5 to the end, 3,000,000 samples." in page
    assert "the test bound is still highest at the end, 700 after 3,000,000 samples" in page  # of the first seed


def test_the_page_tells_what_a_wider_start_changes(tmp_path: Path) -> None:
    settings = {"data": "frey", "latent": 5, "hidden": 200, "num_train": 1_600, "train_kl": 8.0, "least_scale": 0.004}
    rows = [
        row(method, samples, bound + samples / 1e5, initial_sd=initial_sd, **settings)
        for method, initial_sd, bound in (
            ("aevb", 0.01, 700.0),
            ("wake_sleep", 0.01, 577.0),
            ("aevb", 0.1, 690.0),
            ("wake_sleep", 0.1, 660.0),
        )
        for samples in (1_000_000, 3_000_000)[: 1 if (method, initial_sd) == ("wake_sleep", 0.1) else 2]
    ]
    part("tables").write_table(tmp_path / "figure2.csv", rows)
    part("page").write(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    first, other = page.split("### The same with N(0, 0.01) for a standard deviation of 0.1")
    assert "| Frey Face, N_z = 5 | 3,000,000 | 730.0 (731.0) | 607.0 (608.0) | +123.0 |" in first
    assert "| Frey Face, N_z = 5 | 1,000,000 (partial) | 700.0 (701.0) | 670.0 (671.0) | +30.0 |" in other
    assert "of both: Frey Face, N_z = 5, -10.0 (3,000,000)." in other  # AEVB
    assert "of both: Frey Face, N_z = 5, +83.0 (1,000,000)." in other  # wake-sleep


def test_runs_of_other_starts_have_names_and_weights_of_their_own() -> None:
    make, narrow, wide = part("models").make_vae, curve(), curve(initial_sd=0.1)
    assert narrow.name != wide.name
    assert wide.keys["initial_sd"] == 0.1
    for few, many in zip(make(narrow, 784).parameters(), make(wide, 784).parameters(), strict=True):
        torch.testing.assert_close(10 * few, many)


def evidence_row(estimator: str, mean: float, **changes: Any) -> dict[str, Any]:
    found = {
        "method": "aevb",
        "num_train": 1_000,
        "rate": 0.02,
        "samples": 3_000_000,
        "part": "test",
        "estimator": estimator,
    }
    found |= {"rows": 1_000, "mean": mean, "rows_error": 0.5, "mean_of_first": mean - 1, "first": 100}
    return {**found, **changes}


def difference_row(estimator: str, difference: float, **changes: Any) -> dict[str, Any]:
    found = {"method": "aevb", "num_train": 1_000, "samples": 3_000_000, "part": "test", "estimator": estimator}
    found |= {"rows": 1_000, "kept": 990, "difference": difference, "monte_carlo_error": 0.01}
    return {**found, "difference_all": difference + 0.01, "largest": -2.0, "misses": 3, **changes}


def test_the_page_says_where_estimators_agree_and_who_was_better_before_the_end(tmp_path: Path) -> None:
    rows = [evidence_row("bridge", -140.0), evidence_row("bridge", -110.0, part="train")]
    rows += [evidence_row("bridge", -138.0, samples=1_000_000)]
    rows += [
        evidence_row("bridge", mean, method="mcem", part=part_) for part_, mean in (("test", -139.0), ("train", -105.0))
    ]
    rows += [evidence_row("bridge", -150.0, num_train=50_000, samples=1_000_000, method="mcem")]
    differences = [difference_row("bridge", 0.02), difference_row("ais", -0.2), difference_row("reciprocal", 0.05)]
    differences += [difference_row("ais", 0.03, num_train=50_000, samples=1_000_000, rows=20, kept=19)]
    part("tables").write_table(tmp_path / "figure3.csv", rows)
    part("tables").write_table(tmp_path / "estimators.csv", differences)
    part("page").write(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "the first 100 new digits (training digits): AEVB -141.0 (-111.0), Monte Carlo EM -140.0 (-106.0)." in page
    assert "Highest on new digits: Monte Carlo EM." in page
    assert (
        "- AEVB, 1,000 training digits: new digits are likeliest, -139.0, after 1,000,000 samples, and -141.0 after"
        in page
    )
    assert "quadrature in the mean in 1 of 2 cases, on 1,000 test digits." in page
    assert "quadrature in the mean in 1 of 1 cases, on 20 test digits so far." in page
    assert "so misled are 3 of 1,000 by bridge and 6 of 1,020 by AIS." in page
    assert "- Further off: AIS, AEVB with 1,000 digits, by -0.200 ± 0.010." in page
    assert (
        "- App. D is off by +0.060 to +0.060 nats in the mean over all digits, and by -2.00 in the worst (AEVB, 1,000"
        in page
    )
    assert "| 50,000, AEVB | AIS | +0.0300 ± 0.0100 (19) |" in page  # although others have gone further
    assert "| 1,000 | AEVB | 0.02 | 3,000,000 |  | -140.00 ± 0.50 (1000) |  |  |" in page


def test_points_of_a_panel_are_of_the_same_first_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(count: int) -> list[dict[str, Any]]:
        return [{"value": -float(i), "standard_error": 0.1, "is_flagged": 0} for i in range(count)]

    places = [
        ({**curve(num_train=num_train).keys, "samples": samples, "part": "test", "rate": 0.1}, {"bridge": rows(count)})
        for num_train, samples, count in ((400, 100, 3), (400, 200, 7), (800, 200, 9))
    ]
    figure3 = part("figure3")
    monkeypatch.setattr(figure3, "_places", lambda job: iter(places))
    figure3._write(part("settings").Job(tmp_path, tmp_path))
    found = part("tables").read_table(tmp_path / "figure3.csv")
    assert [(entry["first"], entry["mean_of_first"], entry["mean"]) for entry in found] == [
        (3, -1, -1),
        (3, -1, -3),
        (9, -4, -4),
    ]


def test_the_committed_page_is_that_of_the_committed_tables(tmp_path: Path) -> None:
    for path in [*PAPER.glob("*.csv"), *PAPER.glob("*.png")]:
        shutil.copy(path, tmp_path)
    part("page").write(tmp_path)
    told = [
        [line for line in (folder / "README.md").read_text(encoding="utf-8").splitlines() if "Written on" not in line]
        for folder in (PAPER, tmp_path)
    ]
    assert told[0] == told[1]


def test_committed_files_are_small() -> None:
    assert sum(path.stat().st_size for path in PAPER.iterdir() if path.is_file()) < 10 * 2**20


@needs_images
@pytest.mark.parametrize("method", ["aevb", "wake_sleep"])
def test_a_curve_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, method: str) -> None:
    train, own = part("curves").train_curve, curve(method=method)
    whole = train(own, 4_800, tmp_path / "whole", keeps_snapshots=True)
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole" / f"{own.name}_rates.csv", tmp_path / "parts")  # chosen on as many samples
    train(own, 3_600, tmp_path / "parts")
    taken_up = train(own, 4_800, tmp_path / "parts")
    names = ("samples", "train_bound", "test_bound")
    assert [[entry[name] for name in names] for entry in taken_up if entry["samples"] != 3_600] == [
        [entry[name] for name in names] for entry in whole
    ]
    states = [
        part("curves").read_vae(own, tmp_path / place / f"{own.name}.pt").state_dict() for place in ("whole", "parts")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    kept = part("contenders").snapshots(own, tmp_path / "whole")
    assert list(kept) == [0, *(entry["samples"] for entry in whole)]
    last = part("curves").read_vae(own, kept[whole[-1]["samples"]])
    images = part("settings").load_images("mnist", 400)
    assert part("curves").bound_of(last, images.test, seed=1) == whole[-1]["test_bound"]


@needs_images
def test_a_curve_that_is_long_enough_is_left_as_it_is(tmp_path: Path) -> None:
    train, own = part("curves").train_curve, curve()
    longer = train(own, 2_000, tmp_path)
    networks = (tmp_path / f"{own.name}.pt").read_bytes()
    assert [entry["samples"] for entry in train(own, 1_200, tmp_path)] == [entry["samples"] for entry in longer]
    assert (tmp_path / f"{own.name}.pt").read_bytes() == networks


@needs_images
@pytest.mark.parametrize("method", ["aevb", "mcem"])
def test_ctrl_c_is_not_taken_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A run that was stopped leaves no result behind, and the next start ends as one that nobody stopped."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    contenders, own = part("contenders"), curve(method=method)
    monkeypatch.setattr(contenders, "_CHECKPOINT_SAMPLES", 400)
    for place in ("whole", "parts"):
        rates = [{"rate": 0.02, "log_marginal" if method == "mcem" else "train_bound": -1.0}]
        part("tables").write_table(tmp_path / place / f"{own.name}_rates.csv", rates)
    contenders.train(own, 4_800, tmp_path / "whole")
    steps: list[None] = []

    def stop(*_: object) -> None:
        steps.append(None)
        if len(steps) == 17:
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            contenders.train(own, 4_800, tmp_path / "parts")
        hook.remove()
        assert not (tmp_path / "parts" / f"{own.name}_4800.pt").exists()
        contenders.train(own, 4_800, tmp_path / "parts")
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, before)
    read, name = part("curves").read_vae, f"{own.name}_4800.pt"
    states = [read(own, tmp_path / place / name).state_dict() for place in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@needs_images
def test_the_rate_is_the_one_that_starts_best(tmp_path: Path) -> None:
    curves, tables, own = part("curves"), part("tables"), curve()
    best = curves.choose_rate(own, 2_000, tmp_path)
    noted = tables.read_table(tmp_path / f"{own.name}_rates.csv")
    assert [entry["rate"] for entry in noted] == [0.01, 0.02, 0.1]
    assert max(noted, key=lambda entry: entry["train_bound"])["rate"] == best
    assert len({entry["train_bound"] for entry in noted}) == 3
    tables.write_table(
        tmp_path / f"{own.name}_rates.csv",
        [{"rate": 0.02, "train_bound": -1.0}, {"rate": 0.1, "train_bound": -math.inf}],
    )
    assert curves.choose_rate(own, 2_000, tmp_path) == 0.02


@pytest.mark.slow
@needs_images
def test_everything_runs_once_in_small(tmp_path: Path) -> None:
    main, out = part("__main__").main, tmp_path / "out"
    settings = ["--quick", "--state", str(tmp_path / "state"), "--out", str(out)]
    assert main(["all", *settings]) == 0
    names = {path.name for path in out.iterdir()}
    pictures = {"figure2.png", "figure3.png", "figure4_mnist.png", "figure4_frey.png", "figure5_z2.png", "variance.png"}
    assert names >= pictures | {
        "figure2.csv",
        "figure3.csv",
        "estimators.csv",
        "variance.csv",
        "full_vb.csv",
        "after.csv",
    }
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "No run of this part" not in page
    assert len(re.findall(r"^## ", page, flags=re.MULTILINE)) == 8
    read = part("tables").read_table
    for entry in read(out / "figure2.csv"):
        assert math.isfinite(entry["test_bound"])
    by_bridge, by_grid = (
        {(e["method"], e["estimator"]): e["mean"] for e in read(out / "figure3.csv") if e["part"] == "test"}[
            "aevb", estimator
        ]
        for estimator in ("bridge", "quadrature")
    )
    assert by_bridge == pytest.approx(by_grid, abs=0.5)  # chains of 50 draws
    before = page
    assert main(["figure2", "figure3", "page", "--draw", *settings]) == 0  # what the state holds draws the same page
    drawn = (out / "README.md").read_text(encoding="utf-8")
    assert drawn == before


def test_a_quick_run_may_not_overwrite_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        part("__main__").main(["figure2", "--quick"])
    assert "give it an --out of its own" in capsys.readouterr().err
