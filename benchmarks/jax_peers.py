"""The same programs in NumPyro: steps that XLA compiled, one at a time and many in one ``lax.scan``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.programs import NUM_GROUPS
from benchmarks.timing import Block

__all__ = ["numpyro_groups", "numpyro_vae"]


def _weights(module: nn.Module) -> list[Any]:
    import jax.numpy as jnp

    return [jnp.asarray(parameter.detach().numpy()) for parameter in module.parameters()]


def numpyro_vae(encoder: nn.Module, decoder: nn.Module, latent: int, batches: Tensor) -> dict[str, Block]:
    """Return blocks of steps of the paper's autoencoder, from a torch one's weights, on batches ``[number, rows, pixels]``."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    initial = {"encoder": _weights(encoder), "decoder": _weights(decoder)}

    def network(name: str, x: Any) -> Any:
        a, b, c, d = (numpyro.param(f"{name}{number}", weight) for number, weight in enumerate(initial[name]))
        return jnp.tanh(x @ a.T + b) @ c.T + d

    def model(x: Any) -> None:
        with numpyro.plate("data", 60_000, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            logits = network("decoder", z)
            # grey levels under a Bernoulli's formula
            numpyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc, log_variance = jnp.split(network("encoder", x), 2, -1)
        with numpyro.plate("data", 60_000, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_variance / 2)).to_event(1))

    return _blocks(model, guide, jnp.asarray(batches.numpy()))


def numpyro_groups(encoder: nn.Module, batches: Tensor) -> dict[str, Block]:
    """Return blocks of steps of the hierarchy, on batches ``[number, rows, size]``."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    initial, size = _weights(encoder), batches.shape[-1]

    def model(x: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = numpyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", NUM_GROUPS, subsample_size=len(x)):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("x", dist.Normal(theta[..., None], 1.0).expand([len(x), size]).to_event(1), obs=x)

    def guide(x: Any) -> None:
        locs, log_scales = numpyro.param("locs", jnp.zeros(2)), numpyro.param("log_scales", -jnp.ones(2))
        mu = numpyro.sample("mu", dist.Normal(locs[0], jnp.exp(log_scales[0])))
        tau = numpyro.sample("tau", dist.LogNormal(locs[1], jnp.exp(log_scales[1])))
        a, b, c, d = (numpyro.param(f"encoder{number}", weight) for number, weight in enumerate(initial))
        shared = jnp.broadcast_to(jnp.stack([mu, tau]), (len(x), 2))
        output = jnp.tanh(jnp.concatenate([x, shared], -1) @ a.T + b) @ c.T + d
        with numpyro.plate("data", NUM_GROUPS, subsample_size=len(x)):
            numpyro.sample("theta", dist.Normal(output[:, 0], jnp.exp(output[:, 1])))

    return _blocks(model, guide, jnp.asarray(batches.numpy()))


def _blocks(model: Callable[[Any], None], guide: Callable[[Any], None], batches: Any) -> dict[str, Block]:
    import jax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import Adam

    svi = SVI(model, guide, Adam(1e-3), Trace_ELBO())
    first = svi.init(jax.random.PRNGKey(int(torch.initial_seed() % 2**31)), batches[0])
    update = jax.jit(svi.update)
    scan = jax.jit(lambda state, batches: jax.lax.scan(svi.update, state, batches))
    states = {"step": first, "scan": first}

    def step(num_steps: int) -> None:
        state = states["step"]
        for number in range(num_steps):
            state, loss = update(state, batches[number % len(batches)])
            float(loss)  # as every contender tells its bound
        states["step"] = state

    def scanned(num_steps: int) -> None:
        order = jax.numpy.arange(num_steps) % len(batches)
        states["scan"], losses = scan(states["scan"], batches[order])
        jax.block_until_ready(losses)

    return {"NumPyro, jitted step": step, "NumPyro, scan": scanned}
