"""Tutorials and the programs of the start page run as they stand; kept outputs are those of a run without errors."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_tutorials():
    assert "01_vae" in {path.stem for path in TUTORIALS}


def executed(name, tmp_path):
    """A tutorial after a run in a folder of its own; the client raises if a cell does."""
    notebook = read(ROOT / "tutorials" / name)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[], execution_count=None)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    return notebook


@pytest.mark.parametrize("epochs", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["two epochs", "as it is kept"])
def test_01_vae_runs(epochs, monkeypatch, tmp_path):
    if epochs:
        monkeypatch.setenv("PYRO_AEVB_TUTORIAL_EPOCHS", str(epochs))
    notebook = executed("01_vae.ipynb", tmp_path)
    text = "".join(output.get("text", "") for output in outputs(notebook))
    assert epochs is None or f"after {epochs} epochs" in text
    assert "True" in text.split("reliable rows within")[1], "what was loaded is not what was saved"
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_kept_with_its_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_names_no_path_of_one_machine(path):
    for output in outputs(read(path)):
        text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|var|work|Users)/", text)


SMALLER = {
    "log_marginal(images.test,": "log_marginal(images.test, num_samples=200,",
    "seed=0)": "seed=0, progress=False)",
    "num_epochs=20": "num_epochs=2",
}
"""What is changed in the start page's programs so that they are quick and silent."""


def test_the_programs_of_the_start_page_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {"__name__": "start_page"}
    for block in blocks:
        for text, smaller in SMALLER.items():
            block = block.replace(text, smaller)
        exec(compile(block, "docs/index.md", "exec"), names)
    assert names["z"]["z"].shape == (1000, 297, 10)
    assert len(names["evidence"]) == 297
    assert "log p(x) of 297 rows" in capsys.readouterr().out
    assert float(names["loss"](names["images"].train[:50]).detach()) > 0
    assert names["svi"].step(names["images"].train[:50]) > 0
