"""Draws in ArviZ: the groups, names and numbers, under the ArviZ that is installed and under 1.x where a Python 3.12 is found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import arviz as az
import jaxtyping
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_aevb import LogDensity, PredictiveCheck, export_posterior, posterior, predictive_check
from pyro_aevb.arviz_arrays import from_arrays
from pyro_aevb.errors import DataError
from pyro_aevb.export import to_arviz
from pyro_aevb.mcmc.convergence import bulk_ess
from pyro_aevb.mcmc.draws import PosteriorDraws, assess
from pyro_aevb.testing import NormalNormal

ROOT = Path(__file__).resolve().parents[1]


def make_chains(num_rows: int = 3) -> PosteriorDraws:
    """Return chains of a site of two coordinates."""
    u = torch.randn(4, 100, num_rows, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judged = assess(
        u,
        -u.square().sum(-1) / 2,
        acceptance=torch.full((num_rows,), 0.8),
        step_size=torch.ones(num_rows),
        num_divergent=torch.zeros(num_rows, dtype=torch.long),
    )
    judged.samples["z"] = u.exp()
    return judged


def test_chains_and_guide_are_groups_of_one_object() -> None:
    chains, guide = make_chains(), {"z": torch.rand(50, 3, 2)}
    log_likelihood = {"x": -torch.rand(4, 100, 3)}
    data = to_arviz(chains, guide=guide, log_likelihood=log_likelihood, observed_data={"x": torch.arange(3.0)})
    assert data.posterior["z"].dims == ("chain", "draw", "row", "z_dim_0")
    np.testing.assert_array_equal(data.posterior["z"], chains.samples["z"])
    np.testing.assert_array_equal(data.sample_stats["lp"], chains.log_joint)
    assert data.guide["z"].shape == (1, 50, 3, 2)
    np.testing.assert_array_equal(data.guide["z"][0], guide["z"])
    np.testing.assert_array_equal(data.log_likelihood["x"], log_likelihood["x"])
    assert data.observed_data["x"].dims == ("row",)
    assert data.posterior.attrs["inference_library"] == "pyro_aevb"
    chains.samples["z"].zero_()
    assert data.posterior["z"].min() > 0  # a copy


def test_a_whole_model_has_no_rows() -> None:
    one = make_chains(num_rows=1)
    one.samples["z"] = one.samples["z"].squeeze(2)
    data = to_arviz(one, has_rows=False)
    assert data.posterior["z"].dims == ("chain", "draw", "z_dim_0")
    assert data.sample_stats["lp"].dims == ("chain", "draw")


# What ArviZ makes of them


@pytest.fixture(scope="module")
def whole() -> Any:
    """Everything in one object: chains, a guide, densities, data and replicated data of three rows."""
    chains, guide = make_chains(), {"z": torch.rand(400, 3, 2)}
    log_likelihood = {"x": -1 - torch.rand(4, 100, 3)}
    return to_arviz(chains, guide=guide, log_likelihood=log_likelihood, predictive=make_check())


def make_check() -> PredictiveCheck:
    """Return a predictive check of three rows, and of a statistic that no test asks for."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return predictive_check(
        model, guide, torch.tensor([-1.0, 0.0, 2.0]), num_samples=60, num_kept=40, seed=0, progress=False
    )


def test_summary_names_rows_and_coordinates(whole: Any) -> None:
    for group in ("posterior", "guide"):
        table = az.summary(whole, group=group)
        values = whole[group]["z"].values
        assert list(table.index) == [f"z[{row}, {place}]" for row in range(3) for place in range(2)]
        for column, expected in (("mean", values.mean((0, 1))), ("sd", values.std((0, 1), ddof=1))):
            np.testing.assert_allclose(table[column].to_numpy().reshape(3, 2), expected, atol=1e-3)
    expected = bulk_ess(torch.from_numpy(whole.posterior["z"].values))
    assert az.summary(whole).loc["z[2, 1]", "ess_bulk"] == pytest.approx(expected[2, 1].item(), abs=1)


def test_forest_has_both_posteriors_in_each_row(whole: Any) -> None:
    axes = az.plot_forest([whole.posterior, whole.guide], model_names=["chains", "guide"], var_names=["z"])
    assert len(axes[0].get_yticklabels()) == 6
    assert {text.get_text() for text in axes[0].get_legend().get_texts()} == {"chains", "guide"}
    plt.close("all")


@pytest.mark.parametrize("group", ["posterior", "guide"])
def test_pair_takes_a_row(whole: Any, group: str) -> None:
    axes = az.plot_pair(whole, group=group, var_names=["z"], coords={"row": [2]})
    drawn = axes.collections[0].get_offsets() if axes.collections else axes.lines[0].get_xydata()
    np.testing.assert_allclose(np.asarray(drawn), whole[group]["z"].values[:, :, 2].reshape(-1, 2), rtol=1e-6)
    plt.close("all")


@pytest.mark.parametrize("group", ["posterior", "prior"])
def test_ppc_takes_replicated_data(whole: Any, group: str) -> None:
    check = make_check()
    replicated = whole[f"{group}_predictive"]["x"]
    assert replicated.dims == ("chain", "draw", "row")
    np.testing.assert_array_equal(replicated, getattr(check, f"{group}_predictive")["x"])
    np.testing.assert_array_equal(whole.observed_data["x"], [-1.0, 0.0, 2.0])
    axes = az.plot_ppc(whole, group=group, num_pp_samples=30)
    assert f"{group.title()} predictive" in {text.get_text() for text in axes.get_legend().get_texts()}
    assert len(axes.lines) >= 30
    plt.close("all")


def test_other_pictures(whole: Any) -> None:
    assert az.plot_trace(whole, var_names=["z"]).shape == (1, 2)
    az.plot_posterior(whole, group="guide", coords={"row": [0]})
    az.plot_khat(az.loo(whole, pointwise=True))
    plt.close("all")


def test_compare_ranks_chains_and_guide() -> None:
    both = {
        "chains": to_arviz(make_chains(), log_likelihood={"x": -1 - torch.rand(4, 100, 3)}),
        "guide": to_arviz({"z": torch.rand(400, 3, 2)}, log_likelihood={"x": -3 - torch.rand(400, 3)}),
    }
    table = az.compare(both)
    assert list(table.index) == ["chains", "guide"]
    assert table.loc["guide", "elpd_loo"] == pytest.approx(az.loo(both["guide"]).elpd_loo)


# Leave-one-out against its closed form


def check_loo(data: Any, exact: Tensor) -> None:
    """Hold leave-one-out of each row against its exact value; errors are those of 1 over a mean of inverse likelihoods."""
    found = az.loo(data, pointwise=True, reff=1.0)
    inverse = (-data.log_likelihood["x"]).pipe(np.exp)
    error = inverse.std(("chain", "draw")) / inverse.mean(("chain", "draw")) / inverse[:, :, 0].size ** 0.5
    assert found.pareto_k.max() < 0.6
    assert (abs(found.loo_i.values - exact.numpy()) < 4.5 * error.values).all()
    assert abs(found.elpd_loo - exact.sum().item()) < 4.5 * error.values.sum()
    assert 4.5 * error.values.max() < 0.15


def test_loo_of_a_shared_mean_is_exact() -> None:
    """Of rows N(m, 1) under m ~ N(0, 1), the others leave m ~ N(sum / n, 1 / n), and the row N(sum / n, 1 + 1 / n)."""

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    generator = torch.Generator().manual_seed(3)
    x = 0.5 + torch.randn(12, generator=generator)
    noise = torch.randn(4, 2000, generator=generator)
    draws = (x.sum() + 13**0.5 * noise) / 13
    each = LogDensity(model, x, given={"m": draws}).log_likelihood(torch.zeros(4, 2000, 12, 0))
    guide = to_arviz({"m": draws.flatten()}, log_likelihood={"x": each.flatten(0, 1)}, has_rows=False)
    left = (x.sum() - x) / 12
    check_loo(guide, dist.Normal(left, (1 + 1 / 12) ** 0.5).log_prob(x))
    torch.testing.assert_close(each, dist.Normal(draws[..., None], 1.0).log_prob(x), rtol=0, atol=1e-5)


def test_loo_of_rows_with_latents_is_their_evidence() -> None:
    """Rows N(z, 9) under z ~ N(0, 1) share nothing: what is left of a row is N(0, 10)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 3.0), obs=x)

    generator = torch.Generator().manual_seed(4)
    x = 10**0.5 * torch.randn(8, generator=generator)
    u = x / 10 + 0.9**0.5 * torch.randn(4, 2000, 8, generator=generator)
    each = LogDensity(model, x).log_likelihood(u[..., None])
    data = to_arviz({"z": u.flatten(0, 1)}, log_likelihood={"x": each.flatten(0, 1)}, observed_data={"x": x})
    check_loo(data, dist.Normal(0.0, 10**0.5).log_prob(x))


# Refusals

ONE = {"z": torch.zeros(1, 6)}
REFUSED = {
    "nothing": (lambda: to_arviz({}), "at least one site"),
    "no object": (lambda: to_arviz(None), "site: tensor.* got NoneType"),
    "a tensor": (lambda: to_arviz(torch.zeros(6)), "got Tensor"),
    "lists": (lambda: to_arviz({"z": [1.0]}), "tensor for site 'z', got list"),
    "no axis of rows": (lambda: to_arviz({"z": torch.zeros(6)}), r"'row': None.* shape \[1, 6\].*has_rows=False"),
    "a number": (lambda: to_arviz({"z": torch.tensor(1.0)}), "'draw': None"),
    "draws of two lengths": (lambda: to_arviz({**ONE, "w": torch.zeros(2, 6)}), r"'w' .*'draw': 1.*\[1, 2, 6\]"),
    "a guide's shape": (lambda: to_arviz(ONE, guide={"z": torch.zeros(9, 4)}), r"\*\[6\]\] .* got \[9, 4\]"),
    "a guide's site": (lambda: to_arviz(ONE, guide={"w": torch.zeros(9, 6)}), r"sites \['w'\].*\['z'\]"),
    "chains as a guide": (lambda: to_arviz(ONE, guide=make_chains()), "guide must be .* got PosteriorDraws"),
    "densities summed": (lambda: to_arviz(ONE, log_likelihood={"x": torch.zeros(1)}), r"log_likelihood .*\[1, 1\]"),
    "densities of chains": (
        lambda: to_arviz(make_chains(), log_likelihood={"x": torch.zeros(400, 3)}),
        r"'chain': 4, 'draw': 100, 'row': 3\}.*\[400, 3\]",
    ),
    "data of other rows": (lambda: to_arviz(ONE, observed_data={"x": torch.zeros(5)}), r"\{'row': 6\}.*\[5\]"),
    "a predictive tensor": (lambda: to_arviz(ONE, predictive=torch.zeros(5)), "predictive_check.* got Tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    do, message = REFUSED[name]
    jaxtyping.config.update("jaxtyping_disable", True)  # the check of annotations would come first
    try:
        with pytest.raises(DataError, match=message):
            do()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_arrays_and_half_precision_are_taken() -> None:
    data = to_arviz({"z": np.ones((9, 2)), "w": torch.ones(9, 2, dtype=torch.bfloat16, requires_grad=True)})
    assert data.posterior["w"].dtype == np.float32
    assert data.posterior["z"].shape == (1, 9, 2)


def test_arrays_need_as_many_names_as_axes() -> None:
    with pytest.raises(ValueError, match="zip"):
        from_arrays({"posterior": {"z": np.zeros((1, 2, 3))}}, {"posterior": {"z": ["chain", "draw"]}}, {})


def test_the_conversion_of_arrays_knows_neither_torch_nor_the_package() -> None:
    script = "import sys, runpy; runpy.run_path(sys.argv[1]); print('torch' in sys.modules, 'pyro_aevb' in sys.modules)"
    command = [sys.executable, "-c", script, str(ROOT / "pyro_aevb" / "arviz_arrays.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


# ArviZ 1.x, in a small environment of its own

UNDER_ONE = """
import json, runpy, sys
import numpy as np
import arviz as az
from scipy import stats
from_arrays = runpy.run_path(sys.argv[1])["from_arrays"]
rng = np.random.default_rng(0)
rows = ["chain", "draw", "row"]
sites = rows + ["z_dim_0"]
dims = {"posterior": {"z": sites}, "guide": {"z": sites}, "log_likelihood": {"x": rows}, "observed_data": {"x": ["row"]},
        "posterior_predictive": {"x": rows}, "prior_predictive": {"x": rows}}
def make(shift):
    groups = {"posterior": {"z": rng.normal(size=(4, 100, 3, 2)) + shift}, "guide": {"z": rng.normal(size=(1, 50, 3, 2))},
              "log_likelihood": {"x": rng.normal(size=(4, 100, 3)) / 9 - shift}, "observed_data": {"x": rng.normal(size=3)},
              "posterior_predictive": {"x": rng.normal(size=(1, 40, 3))}, "prior_predictive": {"x": rng.normal(size=(1, 40, 3))}}
    return from_arrays(groups, dims, {"inference_library": "pyro_aevb"}), groups
data, groups = make(0.0)
other, _ = make(2.0)
tables = {group: az.summary(data, group=group) for group in ("posterior", "guide")}
means = {group: table["mean"].astype(float).to_numpy().reshape(3, 2) for group, table in tables.items()}
forest = az.plot_forest({"chains": data, "other": other}, var_names=["z"])
pair = az.plot_pair(data, var_names=["z"], coords={"row": 0})
pictures = {
    "forest": forest, "forest of guide": az.plot_forest(data, group="guide", var_names=["z"]), "pair": pair,
    "pair of guide": az.plot_pair(data, group="guide", var_names=["z"], coords={"row": 0}),
    "ppc": az.plot_ppc_dist(data, num_samples=30), "prior ppc": az.plot_ppc_dist(data, group="prior_predictive"),
    "trace": az.plot_trace(data), "both": az.plot_dist({"chains": data, "other": other}),
}
compared = az.compare({"one": data, "other": other})
pictures["compare"] = az.plot_compare(compared)
# rows N(m, 1) under m ~ N(0, 1): what the others leave of a row is N(sum / n, 1 + 1 / n)
x = 0.5 + rng.normal(size=12)
m = (x.sum() + 13**0.5 * rng.normal(size=(1, 8000))) / 13
each = stats.norm.logpdf(x, m[..., None])
loo_dims = {"posterior": {"m": rows[:2]}, "log_likelihood": {"x": rows}}
loo = az.loo(from_arrays({"posterior": {"m": m}, "log_likelihood": {"x": each}}, loo_dims, {}), pointwise=True, reff=1.0)
exact = stats.norm.logpdf(x, (x.sum() - x) / 12, (1 + 1 / 12) ** 0.5)
error = np.exp(-each).std((0, 1)) / np.exp(-each).mean((0, 1)) / 8000**0.5
print(json.dumps({
    "version": az.__version__, "kind": type(data).__name__, "groups": sorted(data.children),
    "equal": all(bool((data[group][name].values == array).all()) for group in groups for name, array in groups[group].items()),
    "dims": {group: list(data[group][name].dims) for group, names in dims.items() for name in names},
    "names": {group: list(table.index) for group, table in tables.items()},
    "means": {group: float(abs(mean - groups[group]["z"].mean((0, 1))).max()) for group, mean in means.items()},
    "compared": list(compared.index), "pictures": {name: type(item).__name__ for name, item in pictures.items()},
    "models": forest.viz["point_estimate"]["z"].coords["model"].values.tolist(),
    "replicated": int(pictures["ppc"].viz["predictive_dist"]["x"].size),
    "loo": float((abs(loo.elpd_i.values - exact) / error).max()), "k_hat": float(loo.pareto_k.max()),
}))
"""


def working_python() -> tuple[Path | None, list[str]]:
    """Find a python3.12 on the path or among pyenv's that says its version, and what those before it answered.

    A shim of pyenv answers for no version where none of 3.12 is chosen.
    """
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders += [version / "bin" for version in sorted(pyenv.glob("versions/3.12*"))]
    answers = []
    for python in (folder / "python3.12" for folder in folders):
        if not os.access(python, os.X_OK):
            continue
        answer = subprocess.run([str(python), "--version"], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.startswith("Python 3.12"):
            return python, answers
        answers.append(f"{python}: {' '.join((answer.stderr or answer.stdout).split())[:100]}")
    return None, answers


def test_a_python_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dead shim on the path comes before a Python that runs."""
    places = {"shims": "echo 'command not found' >&2; exit 127", "pyenv/versions/3.12.9/bin": "echo Python 3.12.9"}
    for folder, body in places.items():
        path = tmp_path / folder / "python3.12"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "nowhere"), str(tmp_path / "shims")]))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    python, answers = working_python()
    assert python == tmp_path / "pyenv/versions/3.12.9/bin/python3.12"
    assert answers == [f"{tmp_path / 'shims' / 'python3.12'}: command not found"]
    python.unlink()
    assert working_python() == (None, answers)


@pytest.fixture(scope="module")
def python_with_arviz_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python 3.12 that has ArviZ 1.x, in an environment made for the test; skip by name where there can be none."""
    python, answers = working_python()
    if python is None:
        pytest.skip(f"no python3.12 that runs, and ArviZ 1.x needs one: {'; '.join(answers) or 'none found'}")
    folder = tmp_path_factory.mktemp("arviz") / "environment"
    made = subprocess.run([str(python), "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"python3.12 makes no environment: {made.stderr.strip()[:100]}")
    install = [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "arviz>=1,<2",
        "matplotlib",
        "h5netcdf",
        "h5py",
    ]
    found = subprocess.run(install, capture_output=True, text=True, check=False, timeout=300)
    if found.returncode:
        pytest.skip(f"ArviZ 1.x can't be installed: {found.stderr.strip()[-100:]}")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_arrays_are_a_data_tree_under_arviz_1(python_with_arviz_1: Path) -> None:
    command = [str(python_with_arviz_1), "-c", UNDER_ONE, str(ROOT / "pyro_aevb" / "arviz_arrays.py")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=python_with_arviz_1.parent)
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["version"].startswith("1.")
    assert found["kind"] == "DataTree"
    assert found["groups"] == sorted(found["dims"])
    assert found["equal"]
    assert found["dims"]["posterior"] == found["dims"]["guide"] == ["chain", "draw", "row", "z_dim_0"]
    assert found["dims"]["observed_data"] == ["row"]
    names = [f"z[{row}, {place}]" for row in range(3) for place in range(2)]
    assert found["names"] == {"posterior": names, "guide": names}
    assert max(found["means"].values()) < 0.06  # some versions of 1.x round their tables
    assert found["compared"] == ["one", "other"]
    assert found["models"] == ["chains", "other"]
    assert found["replicated"] == 30
    assert set(found["pictures"].values()) == {"PlotMatrix", "PlotCollection"}
    assert found["loo"] < 4.5
    assert found["k_hat"] < 0.6


@pytest.mark.slow
def test_a_file_of_draws_is_read_by_arviz_1(python_with_arviz_1: Path, tmp_path: Path) -> None:
    exact, x = NormalNormal.fixture()
    settings = {"num_samples": 50, "seed": 0, "chunk_size": 3}
    path = export_posterior(exact.model, exact.guide, x, path=tmp_path / "draws.nc", **settings)
    script = (
        "import json, sys, arviz as az; data = az.from_netcdf(sys.argv[1]); z = data['posterior']['z']; "
        "print(json.dumps([type(data).__name__, list(z.dims), z.values[0].tolist(), list(az.summary(data).index)]))"
    )
    command = [str(python_with_arviz_1), "-c", script, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr[-2000:]
    kind, dims, draws, names = json.loads(answer.stdout.splitlines()[-1])
    assert (kind, dims) == ("DataTree", ["chain", "draw", "row"])
    np.testing.assert_array_equal(draws, posterior(exact.model, exact.guide, x, **settings)["z"])
    assert sorted(names) == sorted(["g", *(f"z[{row}]" for row in range(8))])
