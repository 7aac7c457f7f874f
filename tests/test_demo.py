"""The demo's page is whole, needs nothing else and tells the numbers of its result; the command line answers."""

import base64
import html
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pyro
import pytest
import torch

import pyro_aevb
from pyro_aevb import __main__ as command_line
from pyro_aevb.demo import job, page, trial, trust
from pyro_aevb.demo.vae import VAE
from pyro_aevb.errors import FileError, SettingError
from pyro_aevb.status import Status

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects what a browser would load, the headings, the text, and whether tags close."""

    def __init__(self):
        super().__init__()
        self.sources, self.headings, self.tags, self.open, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in {"src", "href", "srcset", "data", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in {"h1", "h2"}:
            self.headings.append(data)


def make_small(patch):
    """Take few draws and short chains, everywhere."""
    patch.setattr(trial, "NUM_SAMPLES", 200)
    patch.setattr(trust, "NUM_EXAMINED", 4)
    patch.setattr(trust, "SAMPLING", {"num_samples": 60, "warmup_steps": 60, "num_leapfrog": 5})
    patch.setattr(trust, "EVIDENCE", {"method": "importance", "num_samples": 500, "num_steps": 20, "num_draws": 500})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        result = job.run(
            "digits", folder / "report", num_epochs=2, latent=3, pictures=folder / "pictures", progress=False
        )
    assert torch.get_num_threads() == threads
    return result


@pytest.fixture(scope="module")
def written(demo):
    reader = Reader()
    reader.feed(demo.page.read_text(encoding="utf-8"))
    return reader


def test_the_page_is_whole(written):
    assert written.open == []
    assert written.tags.count("h1") == 1


def test_the_page_needs_nothing_but_itself(demo, written):
    text = demo.page.read_text(encoding="utf-8")
    assert written.sources
    assert all(source.startswith("data:image/png;base64,") for source in written.sources)
    assert not {"script", "link", "iframe", "object", "embed"} & set(written.tags)
    assert "url(" not in text
    assert "@import" not in text
    for source in written.sources:
        assert base64.b64decode(source.partition(",")[2]).startswith(PNG)


def test_the_page_has_each_section(written):
    assert written.headings[1:] == [
        "What was done",
        "Training",
        "Posterior of unseen digits",
        "Samples",
        "Two latents: the manifold",
        "How likely is an unseen digit?",
        "By another method?",
        "Beside HMC",
        "Where the bound is lost",
        "Which latents are used",
        "The numbers",
        "The machine",
    ]


def test_the_page_tells_every_number_of_both_models(demo, written):
    for number, name in enumerate(("many", "two")):
        for label, value in demo.trials[number].numbers().items():
            assert label in written.text, name
            assert value in written.text, (name, label)


def test_the_page_tells_how_far_two_methods_are_apart(demo, written):
    annealed, weighed = demo.estimates["ais"], demo.estimates["importance"]
    assert (annealed.method, weighed.method, len(annealed), len(weighed)) == ("ais", "importance", 16, 16)
    difference = annealed.value - weighed.value
    text = " ".join(written.text)
    assert f"lies {difference.mean():+.3f} nats from importance sampling" in text
    assert f"between {difference.min():+.3f} and {difference.max():+.3f}" in text


def test_the_page_holds_the_guide_against_chains(demo, written):
    comparison, text = demo.trust.comparison, " ".join(written.text)
    assert len(comparison) == 4
    sound = ~comparison.reference.is_flagged
    assert sound.any()
    moments = comparison.sites["z"].moments
    error = moments.mean_error[sound].square().mean().sqrt().item()
    for number in (
        f"off by {error:.2f} posterior standard deviations",
        f"{error:.3f}",
        f"{moments.sd_ratio[sound].log().mean().exp().item():.3f}",
        f"{comparison.sites['z'].wasserstein.value[sound].mean().item():.3f}",
        f"{comparison.k_hat[sound].median().item():.2f}",
        f"16 chains of 60 draws for each of the first {len(comparison)} test digits",
        f"in {comparison.reference_seconds:.1f} s",
        f"{comparison.guide_seconds:.3f} s, once it was trained",
        f"at most {comparison.reference.r_hat.max().item():.2f}",
    ):
        assert number in text


def test_the_page_shows_the_ledger(demo, written):
    gap, text = demo.trust.gap, " ".join(written.text)
    sound = ~gap.is_flagged
    assert sound.any()
    means = [entry[sound].mean().item() for entry in (gap.inference_gap, gap.approximation_gap, gap.amortization_gap)]
    assert means[0] == pytest.approx(sum(means[1:]))
    assert "Of {:.2f} nats that the bound lacks on these digits, {:.2f} are lost".format(*means) in text
    for entry in (gap.log_marginal.value, gap.approximation_gap, gap.best_bound, gap.amortization_gap, gap.bound):
        assert trial.nats(entry[sound].mean().item()) in written.text


def test_the_page_shows_which_latents_are_used(demo, written):
    many = demo.trials[0]
    assert sorted(many.reports) == [1, 2]
    last, text = many.reports[2], " ".join(written.text)
    assert f"{last.num_active} of 3 latents are used" in text
    assert (
        f"{last.mutual_information:.2f} ± {last.mutual_information_error:.2f} nats (mutual information) of which of 297 test digits"
        in text
    )
    for unit, kl in zip(last.units, last.kl.tolist(), strict=True):
        place = written.text.index(unit)
        assert written.text[place + 1] == trial.nats(kl)
    assert [many.fit.history[1][name] for name in ("active_units", "kl")] == [last.num_active, last.total_kl]


def test_sections_say_so_where_every_row_is_unreliable(demo):
    found, count = demo.trust, len(demo.trust.comparison)
    status = (Status.UNRELIABLE,) * count
    reference = replace(found.comparison.reference, status=status)
    bad = replace(
        found, comparison=replace(found.comparison, reference=reference), gap=replace(found.gap, status=status)
    )
    figures = trust.draw_trust(demo.trials[0], bad)
    assert set(figures) == {"comparison", "collapse"}
    text = str(trust.trust_sections(demo.trials[0], bad, dict.fromkeys(figures, "")))
    assert f"the chains of all {count} digits are unreliable" in text
    assert f"the ledgers of all {count} digits are unreliable" in text
    assert "nan" not in text


def test_an_accuracy_that_is_not_known_is_not_told(demo):
    site = demo.trust.comparison.sites["z"]
    unknown = replace(site, c2st=torch.full_like(site.c2st, math.nan), c2st_se=torch.full_like(site.c2st, math.nan))
    found = replace(demo.trust, comparison=replace(demo.trust.comparison, sites={"z": unknown}))
    _, blocks = trust.trust_sections(demo.trials[0], found, dict.fromkeys(trust.TRUST_CAPTIONS, ""))[0]
    assert "too few effective draws for a classifier" in "".join(blocks)
    assert "nan" not in "".join(blocks)


@pytest.mark.parametrize(
    ("family", "encoder", "advice"),
    [
        ((0.3, 0.3, 0.3, 0.3), (0.1, 0.1, 0.1, 0.1), "A richer family"),
        ((0.1, 0.1, 0.1, 0.1), (0.3, 0.3, 0.3, 0.3), "Longer training or a wider encoder"),
        (
            (0.3, 0.3, 0.3, 0.3),
            (0.1, 0.1, 4.0, 0.1),
            "But on 3 of 4 digits the family loses more: the encoder fails on a few, row 2",
        ),
    ],
)
def test_advice_follows_the_larger_gap_unless_few_digits_make_it(demo, family, encoder, advice):
    old = demo.trust.gap
    best = old.log_marginal.value - torch.tensor(family, dtype=torch.float64)
    gap = replace(
        old, best_bound=best, bound=best - torch.tensor(encoder, dtype=torch.float64), status=(Status.OK,) * 4
    )
    sections = trust.trust_sections(
        demo.trials[0], replace(demo.trust, gap=gap), dict.fromkeys(trust.TRUST_CAPTIONS, "")
    )
    assert advice in sections[1][1][0]


def test_the_page_says_what_a_grey_level_bound_is_not(written):
    text = " ".join(written.text)
    assert "no log-likelihood of binary data" in text
    assert pyro_aevb.__version__ in text
    assert torch.__version__ in text
    assert "1 thread" in text


def test_numbers_are_those_of_the_result(demo):
    many = demo.trials[0]
    numbers = {label: value.replace("−", "-") for label, value in many.numbers().items()}
    assert float(numbers["ELBO of these"]) == pytest.approx(many.elbo, abs=0.006)
    assert float(numbers["log p(x), K = 200"]) == pytest.approx(many.evidence.value.mean().item(), abs=0.006)
    assert float(numbers["k-hat, median"]) == pytest.approx(many.evidence.k_hat.nanmedian().item(), abs=0.006)
    assert numbers["epochs"] == "2"
    decoder = 3 * 200 + 200 + 200 * 64 + 64
    built = sum(parameter.numel() for parameter in many.vi.guide.parameters())
    assert numbers["parameters"] == f"{decoder + built:,}"


def test_the_page_shows_the_model_and_what_was_built_from_it(demo, written):
    text = "".join(written.text)
    assert "def model(self, x: Tensor)" in text
    assert str(demo.trials[0].vi.guide.explain()) in text


def test_bounds_rise_with_the_number_of_draws(demo):
    for one in demo.trials:
        assert one.elbo < one.importance_weighted < one.evidence.value.mean() + 0.05


def test_the_second_model_has_two_latents(demo):
    assert [one.vae.latent for one in demo.trials] == [3, 2]


def test_pictures_are_those_of_the_page(demo, written):
    folder = demo.page.parents[1] / "pictures"
    assert {file.stem for file in folder.iterdir()} == set(demo.pictures)
    on_page = {base64.b64decode(source.partition(",")[2]) for source in written.sources}
    assert {file.read_bytes() for file in folder.iterdir()} == on_page


def test_nothing_unfinished_is_left_beside_the_page(demo):
    assert [file.name for file in demo.page.parent.iterdir()] == ["index.html"]


def test_one_seed_gives_one_result(demo, tmp_path, monkeypatch):
    make_small(monkeypatch)
    seeds = []
    monkeypatch.setattr(job, "compare_estimators", lambda *_, seed, **__: seeds.append(seed) or demo.estimates)
    monkeypatch.setattr(job, "examine", lambda *_, seed, **__: seeds.append(seed) or demo.trust)
    monkeypatch.setattr(job, "report", lambda *_: "")
    again = job.run("digits", tmp_path, num_epochs=2, latent=3, progress=False)
    assert seeds == [0, 0]
    assert again.trials[0].elbo == demo.trials[0].elbo
    assert torch.equal(again.trials[1].evidence.value, demo.trials[1].evidence.value)
    assert again.trials[0].reports[2].to_record() == demo.trials[0].reports[2].to_record()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "faces"}, "known are 'digits', 'mnist'"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"latent": -1}, "latent must be at least 1, got -1"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        job.run(**{"out": tmp_path / "report", **settings})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "report").write_text("a file")
    monkeypatch.setattr(job, "try_model", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(FileError, match="Could not write to the folder"):
        job.run(out=tmp_path / "report")


def test_text_on_the_page_is_escaped():
    nasty = '<script>alert("1 & 2")</script>'
    sections = [(nasty, [page.paragraph(nasty), page.code(nasty), page.table([nasty], {nasty: [nasty]})])]
    text = page.render(nasty, nasty, page.facts({nasty: nasty}), sections)
    assert "<script" not in text
    assert text.count(html.escape(nasty)) == 11


def test_an_old_page_survives_a_failed_write(tmp_path, monkeypatch):
    target = tmp_path / "index.html"
    page.write(target, "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(FileError, match="disk full"):
        page.write(target, "new")
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


def test_the_vae_decodes_to_the_means_of_its_likelihood():
    vae, x = VAE(pixels=6, latent=2, hidden=5), torch.rand(4, 6)
    nodes = pyro.poutine.trace(vae.model).get_trace(x).nodes
    torch.testing.assert_close(nodes["x"]["fn"].mean, vae.decode(nodes["z"]["value"]))


# The command line


def command(*words, timeout=60):
    return subprocess.run(
        [sys.executable, "-m", "pyro_aevb", *words], capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.parametrize("words", [("--help",), ("demo", "--help")])
def test_help_explains_itself(words):
    answer = command(*words)
    assert answer.returncode == 0
    assert "demo" in answer.stdout
    assert answer.stderr == ""


def test_help_of_the_demo_names_each_option():
    text = command("demo", "--help").stdout
    for option in (
        "--data {digits,mnist}",
        "--out DIR",
        "--epochs N",
        "--latent D",
        "--seed S",
        "--pictures DIR",
        "--quiet",
    ):
        assert option in text


def test_help_does_not_wait_for_torch():
    code = "import sys, pyro_aevb.__main__ as m; m._parser().format_help(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "required"),
        (("train",), "invalid choice"),
        (("demo", "--data", "faces"), "invalid choice"),
        (("demo", "--epochs", "many"), "invalid int value"),
    ],
)
def test_words_that_are_not_known_are_refused(words, message):
    answer = command(*words)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_error_of_ours_is_one_line(tmp_path):
    answer = command("demo", "--epochs", "0", "--out", str(tmp_path / "report"))
    assert answer.returncode == 2
    assert answer.stderr == "pyro_aevb: num_epochs must be at least 1, got 0.\n"
    assert answer.stdout == ""


def test_the_command_runs_the_demo_and_prints_its_numbers(tmp_path, monkeypatch, capsys, demo):
    asked = {}

    def run(*words, **settings):
        asked.update(settings, words=words)
        return demo

    monkeypatch.setattr(job, "run", run)
    words = ["demo", "--data", "mnist", "--out", str(tmp_path), "--epochs", "3", "--latent", "4", "--seed", "5"]
    assert command_line.main(words) == 0
    assert asked == {
        "words": ("mnist", str(tmp_path)),
        "num_epochs": 3,
        "latent": 4,
        "seed": 5,
        "pictures": None,
        "progress": True,
    }
    printed = capsys.readouterr().out
    assert str(demo.page) in printed
    for label, value in demo.trials[0].numbers().items():
        assert re.search(rf"^{re.escape(label)} +{re.escape(value)}$", printed, re.MULTILINE)
    assert command_line.main([*words, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert asked["progress"] is False


def test_an_interrupted_fit_ends_the_demo_without_a_page(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_aevb.training.loop.Stepper.step", interrupt)
    assert command_line.main(["demo", "--out", str(tmp_path), "--quiet"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The front of the package, which looks names up late


def test_every_public_name_is_found():
    assert set(pyro_aevb._HOMES) == set(pyro_aevb.__all__)
    for name in pyro_aevb.__all__:
        assert getattr(pyro_aevb, name).__name__ == name
        assert name in dir(pyro_aevb)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pyro_aevb.nothing


@pytest.mark.slow
def test_the_demo_as_it_comes_learns_the_digits(tmp_path):
    """Both models reach what a guide by hand reached (-23.9 nats), and unseen digits still gain after a quarter of the run."""
    large, small = job.run("digits", tmp_path, progress=False).trials
    for one in (large, small):
        assert -24.3 < one.elbo < one.importance_weighted
    history = [record["validation_bound"] for record in large.fit.history]
    assert history[-1] > history[len(history) // 4] > history[0]
