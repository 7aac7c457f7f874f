r"""One leapfrog step of Hamiltonian Monte Carlo for 1,000 rows at once, beside BlackJAX, Pyro's HMC and the bare gradient.

log p(z | x) of each of 1,000 MNIST digits under a Bernoulli decoder 3-100-784 with tanh units: trajectories of ten leapfrog steps,
one chain a row, a momentum and an accept each. BlackJAX runs its HMC kernel under ``vmap`` over rows, jitted; Pyro's HMC runs
one row, since it has one accept for all that it runs. Annealing is held against the gradients that it can't do without.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from pyro.infer.mcmc import HMC
from torch import Tensor, nn

from benchmarks.programs import VAE
from benchmarks.result import Result, Row
from benchmarks.timing import Block, interleave, ratios, spread, threads
from pyro_aevb import LogDensity
from pyro_aevb.datasets import mnist
from pyro_aevb.mcmc.annealing import anneal, sigmoid_schedule
from pyro_aevb.mcmc.hmc import start, transition, value_and_gradient
from pyro_aevb.mcmc.noise import RowNoise, Stream

__all__ = ["run"]

COMPILED = "pyro_aevb, Pyro model, compiled"
OURS = "pyro_aevb, Pyro model"
PLAIN = "pyro_aevb, plain function"
GRADIENT = "bare gradient, plain function"
BLACKJAX = "BlackJAX, vmap and jit"
COMPILED_GRADIENT = "bare gradient, compiled"
COMPILED_ANNEALING = "annealing, Pyro model, compiled"
PYRO = "Pyro HMC, one row"
ANNEALING = "annealing, plain function"
TWO_GRADIENTS = "bare gradients of prior and joint, plain function"
PRODUCTS = "a gradient's matrix products alone"

ROWS, LATENT, HIDDEN, LEAPFROGS = 1000, 3, 100, 10
STEP_SIZE = 0.05


class Measured(NamedTuple):
    """Milliseconds a leapfrog step of each block, by contender."""

    times: dict[str, list[float]]


def run(*, quick: bool) -> Result:
    num_rounds, num_steps = (5, 2) if quick else (15, 10)
    x = mnist("threshold").test[:ROWS]
    torch.manual_seed(0)
    vae = VAE(hidden=HIDDEN, latent=LATENT).train(mode=False)
    with threads(2):
        times = interleave(_contenders(vae, x), num_rounds=num_rounds, num_steps=num_steps, num_warmup=num_steps)
    measured = Measured({name: [ms / LEAPFROGS for ms in values] for name, values in times.items()})
    return Result(
        title="One leapfrog step for 1,000 rows at once",
        setting=f"3-100-784 decoder, {ROWS:,} rows, one chain a row, trajectories of {LEAPFROGS} leapfrog steps, float32, 2 "
        f"threads. {num_rounds} rounds of {num_steps} trajectories of each contender in turn after {num_steps} of warm-up. Medians "
        "over rounds; ratios are taken round by round; spread: the middle half and all rounds.",
        rows=_table(measured),
        notes=(
            "A trajectory costs as many gradients as leapfrog steps; drawing momenta and accepting are part of it. Eager but for "
            "what says compiled: `LogDensity(model, x, compile=True)`, and BlackJAX.",
            "Annealing: the time of as many leapfrog steps, divided by that of the gradients it needs (of prior and of joint, "
            "which one compiled evaluation gives both).",
            "Matrix products alone: the forward and backward products of the decoder at these sizes, of zeros. No sampler of this "
            "model on this machine can be more times faster than Pyro's than these are.",
            "Pyro's HMC runs one row with a fixed step size, after its warm-up; its time is per leapfrog step of that row.",
            *(
                ()
                if find_spec("blackjax")
                else ("BlackJAX is not installed (`pip install pyro_aevb[bench]`): not measured.",)
            ),
        ),
    )


def _contenders(vae: VAE, x: Tensor) -> dict[str, Block]:
    decoder = vae.decoder.requires_grad_(False)
    joint = partial(_log_joint, decoder, x)
    density, compiled = (LogDensity(vae.model, x, compile=is_compiled) for is_compiled in (False, True))
    contenders = {
        COMPILED: _trajectories(compiled.log_joint),
        COMPILED_GRADIENT: _gradients(compiled.log_joint),
        COMPILED_ANNEALING: _annealing(partial(_model_path, compiled)),
        OURS: _trajectories(density.log_joint),
        PLAIN: _trajectories(joint),
        GRADIENT: _gradients(joint),
        ANNEALING: _annealing(partial(_path, decoder, x)),
        TWO_GRADIENTS: _gradients(lambda u: torch.stack(_path(decoder, x, u)).sum(0)),
        PRODUCTS: _products,
        PYRO: _pyro(vae, x[:1]),
    }
    return contenders | ({BLACKJAX: _blackjax(decoder, x)} if find_spec("blackjax") else {})


def _log_prior(u: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(-1)


def _log_joint(decoder: nn.Module, x: Tensor, u: Tensor) -> Tensor:
    logits = decoder(u)
    return _log_prior(u) - nn.functional.binary_cross_entropy_with_logits(
        logits, x.expand_as(logits), reduction="none"
    ).sum(-1)


def _path(decoder: nn.Module, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return _log_prior(u), _log_joint(decoder, x, u)


def _model_path(density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    value = density(u)
    return value.log_prior, value.log_joint


def _trajectories(target: Callable[[Tensor], Tensor]) -> Block:
    noise = RowNoise(0, torch.arange(ROWS), dtype=torch.float32)
    step_size, scale = torch.full((ROWS,), STEP_SIZE), torch.ones(ROWS, LATENT)
    state = start(target, torch.zeros(1, ROWS, LATENT))

    def block(num_steps: int) -> None:
        nonlocal state
        for step in range(num_steps):
            momentum = noise.normal(Stream.MOMENTUM, step, 1, LATENT)
            uniform = noise.uniform(Stream.ACCEPT, step, 1)
            state, _ = transition(
                target, state, momentum, uniform, step_size=step_size, scale=scale, num_leapfrog=LEAPFROGS
            )

    return block


def _gradients(target: Callable[[Tensor], Tensor]) -> Block:
    position = torch.zeros(1, ROWS, LATENT)

    def block(num_steps: int) -> None:
        for _ in range(num_steps * LEAPFROGS):
            value_and_gradient(target, position)

    return block


def _products(num_steps: int) -> None:
    """Multiply what a gradient by the latents multiplies, and nothing else: no gradient of this decoder takes less."""
    u, inner, outer = torch.zeros(ROWS, LATENT), torch.zeros(LATENT, HIDDEN), torch.zeros(HIDDEN, 784)
    for _ in range(num_steps * LEAPFROGS):
        pixels = u @ inner @ outer
        _ = pixels @ outer.T @ inner.T


def _annealing(path: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Block:
    def block(num_steps: int) -> None:
        anneal(
            path,
            torch.zeros(1, ROWS, LATENT),
            sigmoid_schedule(num_steps + 1),  # no transition follows the last weight
            RowNoise(0, torch.arange(ROWS), dtype=torch.float32),
            step_size=torch.full((num_steps, ROWS), STEP_SIZE),
            scale=torch.ones(ROWS, LATENT),
            num_leapfrog=LEAPFROGS,
        )

    return block


def _pyro(vae: VAE, x: Tensor) -> Block:
    kernel = HMC(vae.model, step_size=STEP_SIZE, num_steps=LEAPFROGS, adapt_step_size=False, adapt_mass_matrix=False)
    kernel.setup(0, x)
    params = kernel.initial_params

    def block(num_steps: int) -> None:
        nonlocal params
        for _ in range(num_steps):
            params = kernel.sample(params)

    return block


def _blackjax(decoder: nn.Module, x: Tensor) -> Block:
    import blackjax
    import jax
    import jax.numpy as jnp

    weights: Any = [jnp.asarray(parameter.detach().numpy()) for parameter in decoder.parameters()]
    data = jnp.asarray(x.numpy())

    def log_joint(x_n: Any, u: Any) -> Any:
        logits = jnp.tanh(u @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
        return jax.scipy.stats.norm.logpdf(u).sum() + (x_n * logits - jax.nn.softplus(logits)).sum()

    def step(key: Any, state: Any, x_n: Any) -> Any:
        kernel = blackjax.hmc(partial(log_joint, x_n), STEP_SIZE, jnp.ones(LATENT), LEAPFROGS)
        return kernel.step(key, state)[0]

    step_all = jax.jit(lambda key, states: jax.vmap(step)(jax.random.split(key, ROWS), states, data))
    initial = jax.vmap(lambda u, x_n: blackjax.mcmc.hmc.init(u, partial(log_joint, x_n)))
    states = initial(jnp.zeros((ROWS, LATENT)), data)
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 100_000))

    def block(num_steps: int) -> None:
        nonlocal states
        for _ in range(num_steps):
            states = step_all(next(keys), states)
        jax.block_until_ready(states)

    return block


def _table(measured: Measured) -> list[Row]:
    times = measured.times
    rows = [Row(name, f"{statistics.median(values):.2f} ms", spread(values)) for name, values in times.items()]
    rows.append(_ratio("transition / bare gradient", times[PLAIN], times[GRADIENT]))
    rows.append(_ratio("Pyro model / plain function", times[OURS], times[PLAIN]))
    rows.append(_ratio("annealing / bare gradients", times[ANNEALING], times[TWO_GRADIENTS], "<= 1.25"))
    rows.append(_ratio("compiled transition / bare compiled gradient", times[COMPILED], times[COMPILED_GRADIENT]))
    rows.append(
        _ratio(
            "compiled annealing / bare compiled gradients",
            times[COMPILED_ANNEALING],
            times[COMPILED_GRADIENT],
            "<= 1.2",
        )
    )
    rows.append(_factor("times faster than Pyro's HMC, per row and gradient: eager", times[PYRO], times[OURS]))
    rows.append(
        _factor("times faster than Pyro's HMC, per row and gradient: compiled", times[PYRO], times[COMPILED], 800)
    )
    rows.append(
        _factor("times faster than Pyro's HMC: a gradient's matrix products alone", times[PYRO], times[PRODUCTS])
    )
    if BLACKJAX in times:
        rows.append(_ratio("pyro_aevb, Pyro model, compiled / BlackJAX", times[COMPILED], times[BLACKJAX], "<= 1.1"))
        rows.append(_ratio("pyro_aevb, Pyro model / BlackJAX", times[OURS], times[BLACKJAX]))
        rows.append(_ratio("pyro_aevb, plain function / BlackJAX", times[PLAIN], times[BLACKJAX]))
        rows.append(_factor("times faster than Pyro's HMC: BlackJAX", times[PYRO], times[BLACKJAX]))
    return rows


def _ratio(name: str, ours: Sequence[float], other: Sequence[float], bar: str = "") -> Row:
    values = ratios(ours, other)
    ratio = statistics.median(values)
    return Row(name, f"{ratio:.2f}", spread(values), bar, ratio <= float(bar.removeprefix("<= ")) if bar else None)


def _factor(name: str, one_row: Sequence[float], all_rows: Sequence[float], bar: int | None = None) -> Row:
    values = [ROWS * one_ms / ms for one_ms, ms in zip(one_row, all_rows, strict=True)]
    factor = statistics.median(values)
    return Row(
        name, f"{factor:.0f}", spread(values, 0), f">= {bar}" if bar else "", None if bar is None else factor >= bar
    )
