r"""One compiled training step: this package beside compiled hand-written PyTorch, Pyro's ``SVI`` and NumPyro.

P1, the paper's MNIST model (784-500-20-500-784, batches of 100), is bound by matrix products; P2, a hierarchy (mean and spread of
10,000 groups of eight, batches of 256), by everything around them. Contenders take the same batches from the same initial weights,
in turn: ``Stepper.step`` as ``fit`` calls it, compiled and eager; a hand-written loss under ``torch.compile`` with fused Adam;
``pyro.infer.SVI`` with ``Trace_ELBO`` as it comes; NumPyro's ``SVI``, jitted, one step at a time and many in one scan.
"""

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from typing import NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.optim import Adam
from torch.profiler import ProfilerActivity, profile

from benchmarks import peers
from benchmarks.jax_peers import numpyro_groups, numpyro_vae
from benchmarks.programs import VAE, Groups
from benchmarks.result import Result, Row
from benchmarks.steps import stepper_of_fit
from benchmarks.timing import Block, interleave, ratios, spread, threads
from pyro_aevb import AEVB, SGVB
from pyro_aevb.datasets import mnist
from pyro_aevb.training.data import Batch
from pyro_aevb.training.stepper import Stepper

__all__ = ["run"]

COMPILED = "AEVB, compiled"
EAGER = "AEVB, eager"
HAND_WRITTEN = "hand-written, torch.compile"
PYRO = "Pyro SVI, defaults"
STEP, SCAN = "NumPyro, jitted step", "NumPyro, scan"

MULTIPLICATIONS = 784 * 500 + 500 * 40 + 20 * 500 + 500 * 784
"""Multiplications of P1's four matrix products for a row, forward; backward takes twice as many."""


class Bar(NamedTuple):
    """What a ratio must be.

    Attributes:
        over: The contender whose time is divided.
        under: The contender that it is divided by.
        most: Largest ratio, or
        least: smallest ratio.
    """

    over: str
    under: str
    most: float | None = None
    least: float | None = None


BARS = {
    "P1": (Bar(COMPILED, HAND_WRITTEN, most=1.10), Bar(PYRO, COMPILED, least=1.8), Bar(COMPILED, SCAN, most=1.15)),
    "P2": (Bar(PYRO, COMPILED, least=10.0), Bar(COMPILED, STEP, most=1.2), Bar(COMPILED, SCAN)),
}


class Measured(NamedTuple):
    """Milliseconds a step of each block by contender, for one program."""

    program: str
    times: dict[str, list[float]]


def run(*, quick: bool) -> Result:
    num_rounds, num_steps = (5, {"P1": 10, "P2": 10}) if quick else (21, {"P1": 50, "P2": 400})
    rows = []
    with threads(2):
        for name, contenders in (("P1", _vae()), ("P2", _groups())):
            count = num_steps[name]
            times = interleave(contenders, num_rounds=num_rounds, num_steps=count, num_warmup=count)
            rows += _table(Measured(name, times))
            if name == "P1":
                rows += _rates(statistics.median(times[COMPILED]))
            rows += _operators(name, 20 if quick else 200)
    return Result(
        title="One compiled training step",
        setting="P1: 784-500-20-500-784, batches of 100 of 2,000 digits, Adam 1e-3. P2: mean and spread of 10,000 groups of 8, "
        "batches of 256, encoder 10-32-2, Adam 1e-3, log q drawn. 2 threads. "
        f"{num_rounds} rounds of {num_steps['P1']} (P1) or {num_steps['P2']} (P2) steps of each contender in turn after as many of "
        "warm-up (which compiles). "
        "Medians over rounds; ratios are taken round by round; spread: the middle half and all rounds.",
        rows=rows,
        notes=(
            "Each step takes the next batch and tells its bound as a number, but for the scan, which tells all at its end.",
            "A step of P2 takes a fifth of a millisecond: a block of 50 would end before another library's threads are asleep.",
            "A step of AEVB checks that loss and gradient are finite, and changes nothing where they are not.",
            "Pyro's and NumPyro's losses draw log q in P1, AEVB and the hand-written step take the KL in closed form.",
            "Products at full speed: the time of P1's twelve matrix products alone, by the rate of `torch.mm` at that size.",
            *(() if torch.cuda.is_available() else ("On a GPU: not measured, there is none.",)),
            *(
                ()
                if find_spec("numpyro")
                else ("NumPyro is not installed (`pip install pyro_aevb[bench]`): not measured.",)
            ),
        ),
    )


def _groups_of_eight(num_groups: int) -> Tensor:
    """Simulate groups of eight around means of their own."""
    theta = 1.0 + 2.0 * torch.randn(num_groups, 1)
    return theta + torch.randn(num_groups, 8)


def _program(name: str) -> tuple[Callable[[], VAE | Groups], Callable[[], SGVB], Tensor, int | None]:
    """Return a program's maker, its objective's, its batches, and the number of rows that its plate does not tell."""
    torch.manual_seed(0)
    kind = VAE if name == "P1" else Groups

    def make() -> VAE | Groups:
        torch.manual_seed(0)
        return kind()

    if name == "P1":
        return make, SGVB, mnist().train[:2000].reshape(20, 100, 784), 60_000
    return make, lambda: SGVB(kl="sampled"), _groups_of_eight(20 * 256).reshape(20, 256, 8), None


def _vae() -> dict[str, Block]:
    make, _, batches, _ = program = _program("P1")
    vae = make()
    found = _torch(*program)
    hand = peers.HandWrittenVAE()
    found[HAND_WRITTEN] = hand_written(lambda x: -hand.bound(x).mean(), hand, batches)
    return found | (numpyro_vae(vae.encoder, vae.decoder, 20, batches) if find_spec("numpyro") else {})


def _groups() -> dict[str, Block]:
    make, _, batches, _ = program = _program("P2")
    found = _torch(*program)
    return found | (numpyro_groups(make().encoder, batches) if find_spec("numpyro") else {})


def _torch(
    make: Callable[[], VAE | Groups], objective: Callable[[], SGVB], batches: Tensor, num_data: int | None
) -> dict[str, Block]:
    found = {}
    for name, is_compiled in ((COMPILED, True), (EAGER, False)):
        program = make()
        module = AEVB(program.model, program.guide, objective(), num_data=num_data).module
        module.build(batches[0]).train()
        stepper = stepper_of_fit(module, compile=is_compiled)
        found[name] = steps(stepper, batches)
    return found | {PYRO: svi(make(), batches)}


def steps(stepper: Stepper, batches: Tensor) -> Block:
    source = cycle([Batch((x,), {}) for x in batches])

    def block(num_steps: int) -> None:
        with pyro.validation_enabled(False):
            for _ in range(num_steps):
                stepper.step(next(source))

    return block


def svi(program: VAE | Groups, batches: Tensor) -> Block:
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    source = cycle(batches)
    own: dict[str, dict] = {"params": {}, "constraints": {}}  # the names are every contender's, the values its own

    def block(num_steps: int) -> None:
        with pyro.get_param_store().scope(own), pyro.validation_enabled(True):
            for _ in range(num_steps):
                svi.step(next(source))

    return block


def hand_written(loss: Callable[[Tensor], Tensor], module: nn.Module, batches: Tensor) -> Block:
    compiled = torch.compile(loss, fullgraph=True)
    optimizer = Adam(module.parameters(), lr=1e-3, fused=True)
    source = cycle(batches)

    def block(num_steps: int) -> None:
        for _ in range(num_steps):
            optimizer.zero_grad()
            value = compiled(next(source))
            value.backward()
            optimizer.step()
            value.item()

    return block


def _table(measured: Measured) -> list[Row]:
    name, times = measured
    rows = [
        Row(f"{name}: {contender}", f"{statistics.median(values):.3f} ms", spread(values, 3))
        for contender, values in times.items()
    ]
    for bar in BARS[name]:
        if bar.over not in times or bar.under not in times:
            continue
        values = ratios(times[bar.over], times[bar.under])
        ratio = statistics.median(values)
        row = Row(f"{name}: {bar.over} / {bar.under}", f"{ratio:.2f}", spread(values))
        if bar.most is not None:
            row = row._replace(bar=f"<= {bar.most}", is_met=ratio <= bar.most)
        if bar.least is not None:
            row = row._replace(bar=f">= {bar.least}", is_met=ratio >= bar.least)
        rows.append(row)
    return rows


def _operators(name: str, num_steps: int) -> list[Row]:
    """Say where a compiled step spends its time: the operators that take the most."""
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        make, objective, batches, num_data = _program(name)
        program = make()
        module = AEVB(program.model, program.guide, objective(), num_data=num_data).module
        module.build(batches[0]).train()
        block = steps(stepper_of_fit(module, compile=True), batches)
        block(num_steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        block(num_steps)
    found = [item for item in profiler.key_averages() if not item.key.startswith(("##", "AOT"))]
    found.sort(key=lambda item: -item.self_cpu_time_total)
    total = sum(item.self_cpu_time_total for item in found)
    return [
        Row(
            f"{name}: `{item.key.removeprefix('graph_')[:60]}`, {item.count // num_steps} a step",
            f"{item.self_cpu_time_total / num_steps / 1e3:.3f} ms",
            f"{item.self_cpu_time_total / total:.0%} of what the profiler sees",
        )
        for item in found[:5]
    ]


def _rates(step_ms: float) -> list[Row]:
    """Hold P1's step against the rate that this machine multiplies matrices of its sizes at."""
    pairs = [
        (torch.randn(100, 784), torch.randn(784, 500)),
        (torch.randn(784, 100), torch.randn(100, 500)),
        (torch.randn(100, 500), torch.randn(500, 784)),
    ]

    def products(num_steps: int) -> None:
        for _ in range(num_steps):
            for a, b in pairs:
                torch.mm(a, b)

    (times,) = interleave({"": products}, num_rounds=7, num_steps=50, num_warmup=50).values()
    flops = sum(2 * len(a) * a.shape[1] * b.shape[1] for a, b in pairs)
    rate = flops / (statistics.median(times) / 1e3)
    needed = 100 * 3 * 2 * MULTIPLICATIONS
    return [
        Row("P1: floating-point operations of its matrix products, a row", f"{needed / 100 / 1e6:.2f} million"),
        Row("P1: rate of `torch.mm` at these sizes", f"{rate / 1e9:.0f} GFLOP/s"),
        Row("P1: products at full speed", f"{1e3 * needed / rate:.3f} ms"),
        Row("P1: share of that rate that the whole step reaches", f"{needed / rate / (step_ms / 1e3):.0%}"),
    ]
