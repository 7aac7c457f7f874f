"""Draws in ArviZ: the groups, names and numbers, under the ArviZ that is installed and under 1.x where a Python 3.12 is found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_aevb.arviz_arrays import from_arrays
from pyro_aevb.errors import DataError
from pyro_aevb.export import to_arviz
from pyro_aevb.mcmc.convergence import bulk_ess
from pyro_aevb.mcmc.draws import PosteriorDraws, assess

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


def test_arviz_takes_both_posteriors() -> None:
    chains, guide = make_chains(), {"z": torch.rand(400, 3, 2)}
    both = {"chains": to_arviz(chains, log_likelihood={"x": -1 - torch.rand(4, 100, 3)})}
    both["guide"] = to_arviz(guide, log_likelihood={"x": -3 - torch.rand(400, 3)})
    table = az.summary(both["chains"])
    expected = bulk_ess(chains.samples["z"])
    assert table.loc["z[2, 1]", "ess_bulk"] == pytest.approx(expected[2, 1].item(), abs=1)
    assert table.loc["z[2, 1]", "mean"] == pytest.approx(chains.samples["z"][:, :, 2, 1].mean().item(), abs=1e-3)
    assert list(az.compare(both).index) == ["chains", "guide"]
    whole = to_arviz(chains, guide=guide)
    axes = az.plot_forest([whole.posterior, whole.guide], model_names=["chains", "guide"], var_names=["z"])
    assert len(axes[0].get_yticklabels()) == 6
    assert {text.get_text() for text in axes[0].get_legend().get_texts()} == {"chains", "guide"}
    assert az.plot_pair(whole, group="posterior", var_names=["z"], coords={"row": [0]}) is not None


@pytest.mark.parametrize(
    ("posterior", "guide", "message"),
    [
        ({}, None, "at least one site"),
        ({"z": torch.zeros(10, 3)}, {"z": torch.zeros(10, 4)}, r"'z' must have shape \[draws, \*\[3\]\].*\[10, 4\]"),
    ],
)
def test_draws_that_do_not_fit_are_refused(
    posterior: dict[str, Tensor], guide: dict[str, Tensor] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        to_arviz(posterior, guide=guide)


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
from_arrays = runpy.run_path(sys.argv[1])["from_arrays"]
rng = np.random.default_rng(0)
axes = ["chain", "draw", "row", "z_dim_0"]
def make(shift):
    groups = {"posterior": {"z": rng.normal(size=(4, 100, 3, 2)) + shift}, "guide": {"z": rng.normal(size=(1, 50, 3, 2))},
              "log_likelihood": {"x": rng.normal(size=(4, 100, 3)) / 9 - shift}}
    dims = {"posterior": {"z": axes}, "guide": {"z": axes}, "log_likelihood": {"x": axes[:3]}}
    return from_arrays(groups, dims, {"inference_library": "pyro_aevb"}), groups
data, groups = make(0.0)
other, _ = make(2.0)
table = az.summary(data)
pair = az.plot_pair(data, var_names=["z"], coords={"row": 0})
forest = az.plot_forest({"one": data, "other": other}, var_names=["z"])
print(json.dumps({
    "version": az.__version__, "kind": type(data).__name__, "groups": sorted(data.children), "lines": len(table),
    "equal": bool((data["posterior"]["z"].values == groups["posterior"]["z"]).all()), "dims": list(data["posterior"]["z"].dims),
    "compared": list(az.compare({"one": data, "other": other}).index), "pictures": [type(pair).__name__, type(forest).__name__],
}))
"""


@pytest.fixture(scope="module")
def python_with_arviz_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python 3.12 that has ArviZ 1.x, in an environment made for the test; skip by name where there can be none."""
    python = shutil.which("python3.12")
    if python is None:
        pytest.skip("no python3.12 on the path: ArviZ 1.x needs one")
    answer = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
    if answer.returncode or not answer.stdout.startswith("Python 3.12"):
        pytest.skip(f"python3.12 does not run: {' '.join((answer.stderr or answer.stdout).split())[:100]}")
    folder = tmp_path_factory.mktemp("arviz") / "environment"
    made = subprocess.run([python, "-m", "venv", str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"python3.12 makes no environment: {made.stderr.strip()[:100]}")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "arviz>=1,<2", "matplotlib"]
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
    assert found["groups"] == ["guide", "log_likelihood", "posterior"]
    assert found["equal"]
    assert found["dims"] == ["chain", "draw", "row", "z_dim_0"]
    assert found["lines"] == 6
    assert found["compared"] == ["one", "other"]
    assert found["pictures"] == ["PlotMatrix", "PlotCollection"]
