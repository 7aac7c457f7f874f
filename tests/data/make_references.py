"""Make the references of tests/data: ``PYTHONPATH=tests python tests/data/make_references.py [names]``, all by default."""

import json
import platform
import sys
import time

import pyro
import torch
from model_classes.base import DATA, Batch, ModelClass, first_rows, read_batch, write_batch
from model_classes.registry import REGISTRY
from torch import Tensor

TEST_SEED = 100


def make(entry: ModelClass) -> None:
    """Simulate the rows that count, solve for their posterior and write both."""
    rows, seed = (entry.num_rows, entry.number) if entry.joint else (entry.num_test_rows, TEST_SEED)
    stored = write_batch(entry.simulate(rows, seed=seed))
    args, kwargs = read_batch(stored)
    start = time.perf_counter()
    answer = entry.oracle(entry.model, args, kwargs)
    moments, quality = answer if isinstance(answer, tuple) else (answer, {})
    shapes = cut_shapes(entry, (args, kwargs))
    sites = {
        name: {
            "mean": _numbers(_cut(item.mean, shapes[name])),
            "sd": _numbers(_cut(item.sd, shapes[name])),
            **quality.get(name, {}),
        }
        for name, item in moments.items()
    }
    content = {
        "name": entry.name,
        "method": entry.method,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__},
        "sites": sites,
        "batch": stored,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    (DATA / f"{entry.name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{entry.name}: {time.perf_counter() - start:.1f} s {quality or ''}", flush=True)


def cut_shapes(entry: ModelClass, batch: Batch) -> dict[str, tuple[int, ...]]:
    """Return the shape of each site's value in a run on the test rows."""
    args, kwargs = first_rows(batch, entry.num_rows, entry.num_test_rows) if entry.joint else batch
    nodes = pyro.poutine.trace(entry.model).get_trace(*args, **kwargs).nodes
    return {
        name: tuple(entry.feature(name, node["value"]).shape)
        for name, node in nodes.items()
        if node["type"] == "sample"
    }


def _cut(moment: Tensor, shape: tuple[int, ...]) -> Tensor:
    return moment[tuple(slice(size) for size in shape)]


def _numbers(moment: Tensor) -> object:
    if moment.dim():
        return [_numbers(item) for item in moment]
    return float(f"{float(moment):.6g}")


if __name__ == "__main__":
    for name in sys.argv[1:] or REGISTRY:
        make(REGISTRY[name])
