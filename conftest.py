"""What every test and every documented example starts from: one thread, one seed, no parameters left by another."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko  # noqa: F401 -- here, since its import switches off the checks that the next line switches on

torch.distributions.Distribution.set_default_validate_args(True)

SECONDS_BEFORE_SLOW = 10.0

collect_ignore_glob = ["docs/*.py"]  # part of building the pages, whose packages the tests do without

# Set at import, before any test module looks; a test process is one of several on the machine.
torch.set_num_threads(1)
_shared_data = Path(__file__).resolve().parent.parent / "shared" / "data"
if _shared_data.is_dir():
    os.environ.setdefault("PYRO_AEVB_DATA", str(_shared_data))

hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Give a test seed 0 and an empty param store; afterwards put back every setting that outlives it."""
    settings = pyro.settings.get()
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.settings.set(**settings)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def names_for_examples(doctest_namespace: dict[str, Any]) -> None:
    """Let examples use ``torch``, ``pyro`` and ``dist`` without importing them."""
    doctest_namespace.update(torch=torch, pyro=pyro, dist=dist)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that took long and are not marked slow; they do not fail, since timings are no tests."""
    passed = terminalreporter.stats.get("passed", [])
    late = [report for report in passed if report.duration > SECONDS_BEFORE_SLOW and "slow" not in report.keywords]
    for report in late:
        terminalreporter.write_line(
            f"{report.nodeid} took {report.duration:.0f} s: mark it slow, or make it smaller.", yellow=True
        )
