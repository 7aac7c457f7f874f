"""What two processes do together, run as a script by each of them; ``tests/training/test_distributed.py`` looks at what they saw.

Every check is a function of the Fabric that returns what it found; :func:`main` writes all of it to one file a process.
"""

import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

if __name__ == "__main__":
    from jaxtyping import install_import_hook

    install_import_hook("pyro_aevb", "beartype.beartype")

from pyro_aevb import (
    AEVB,
    IWELBO,
    SGVB,
    ReweightedWakeSleep,
    embed,
    fit,
    hmc_posterior,
    log_marginal,
    posterior,
    predict,
    reconstruct,
)
from pyro_aevb.errors import AEVBError
from pyro_aevb.program.objective_module import ObjectiveModule
from pyro_aevb.program.processes import Processes
from pyro_aevb.randomness import preserved_rng
from pyro_aevb.training.data import as_source
from pyro_aevb.training.sharding import share
from pyro_aevb.training.stepper import Stepper

NUM_DATA = 100
GLOBAL_DRAW = 0.7


class Given(dist.Normal):
    """A normal distribution whose standard draws are given, so that who draws does not matter."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise

    def expand(self, batch_shape, _instance=None):
        return Given(*(item.expand(batch_shape) for item in (self.loc, self.scale, self.noise)))


class Hierarchy(nn.Module):
    """Rows around a mean, which is latent or a parameter; the noise of q is data. Each form of the data plate is one of its own."""

    def __init__(self, *, has_globals, is_sized=False):
        super().__init__()
        self.has_globals, self.is_sized = has_globals, is_sized
        self.double()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(3, 2).double(), nn.Linear(1, 3).double()
        self.mean = nn.Parameter(torch.tensor([0.3, -0.4], dtype=torch.float64))

    def plate(self, x):
        return pyro.plate("data", NUM_DATA, subsample_size=len(x)) if self.is_sized else pyro.plate("data", len(x))

    def model(self, x, noise):
        pyro.module("decoder", self.decoder)
        g = self.mean.sum()
        if self.has_globals:
            g = pyro.sample("g", dist.Normal(x.new_zeros(()), 2.0))
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(g, 1.5))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]), 1.0).to_event(1), obs=x)

    def guide(self, x, noise):
        pyro.module("encoder", self.encoder)
        if self.has_globals:
            pyro.sample("g", Given(self.mean[0], softplus(self.mean[1]), x.new_tensor(GLOBAL_DRAW)))
        with self.plate(x):
            loc, scale = self.encoder(x).unbind(-1)
            pyro.sample("z", Given(loc, softplus(scale), noise))


LAWS = {
    "sampled": (True, False, lambda: SGVB(kl="sampled")),
    "closed form": (True, False, SGVB),
    "sized plate": (True, True, SGVB),
    "no globals": (False, False, SGVB),
    "stl": (True, False, lambda: SGVB(gradient="stl")),
    "score": (True, False, lambda: SGVB(gradient="score")),
    "importance weighted": (True, True, lambda: IWELBO(2)),
    "reweighted wake-sleep": (False, False, lambda: ReweightedWakeSleep(2)),
    "Pyro's": (True, False, Trace_ELBO),
}
"""Has globals, has a sized plate, and the objective, by name."""
ROWS = (8, 5, 1)
"""Rows of the batch of both processes: equal parts, 3 and 2, 1 and none."""


def law_module(name, num_data=NUM_DATA):
    has_globals, is_sized, objective = LAWS[name]
    program = Hierarchy(has_globals=has_globals, is_sized=is_sized)
    module = ObjectiveModule(program.model, program.guide, objective(), num_data=num_data)
    return module.build(*law_rows(2))


def law_rows(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x[:count], torch.randn(8, generator=generator, dtype=torch.float64)[:count]


def gradients(fabric, name, count, num_data=NUM_DATA):
    """Return the bound that a step tells, and the gradient that it leaves."""
    module = law_module(name, num_data)
    still = partial(torch.optim.SGD, lr=0.0)
    stepper = Stepper(module, still, fabric=fabric)
    source = share(as_source(law_rows(count), -(-count // 2)), stepper.processes)
    (batch,) = source.batches()
    bound = stepper.step(batch)
    return bound, {name: item.grad.clone() for name, item in module.named_parameters()}


def check_laws(fabric):
    found = {(name, count): gradients(fabric, name, count) for name in LAWS for count in ROWS}
    return found | {("unknown number", 5): gradients(fabric, "no globals", 5, num_data=None)}


class Uneven(IterableDataset):
    """Two rows in the first process and seven in the second."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        yield from torch.arange(2.0 + 5 * self.rank) + 100 * self.rank


def check_batches(fabric):
    """Return own rows, the number that counts and that of the whole batch, batch by batch, for each kind of data."""
    rows = torch.arange(23.0)

    def seen(data, batch_size=None, **settings):
        source = share(as_source(data, batch_size), Processes(fabric))
        batches = source.batches(torch.Generator().manual_seed(5), **settings)
        told = [(batch.args[0].tolist(), batch.shard.rows, batch.rows) for batch in batches]
        return {"batches": told, "num_batches": source.num_batches(), "num_rows": source.num_rows}

    def two_epochs(**order):
        """Return what two epochs of a loader give, where each process draws by itself."""
        own = share(as_source(DataLoader(TensorDataset(rows), batch_size=4, **order)), Processes(fabric))
        with preserved_rng():
            torch.manual_seed(fabric.global_rank)
            epochs = [
                [(batch.args[0].tolist(), batch.shard.rows, batch.rows) for batch in own.batches()] for _ in range(2)
            ]
        return own, epochs

    source, epochs = two_epochs(shuffle=True)
    return {
        "sampler": two_epochs(sampler=SubsetRandomSampler(range(23)))[1],
        "tensor": seen(rows, 4),
        "skipping": seen(rows, 4, skip=1),
        "dataset": seen(TensorDataset(rows), 4),
        "one batch": seen(rows[:5], 4),
        "stream": seen(Uneven(fabric.global_rank), 2),
        "loader": epochs,
        "loader's rows": source.num_rows,
    }


class Mean(nn.Module):
    """x ~ N(theta, 1) without latents: bounds are known in closed form, and there is no noise."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.theta, 1.0), obs=x)


def no_latents(x):
    pass


HELD_OUT = torch.linspace(-1.0, 3.0, 251)
TRAINED = torch.linspace(-2.0, 2.0, 53)
HUGE = torch.cat([torch.zeros(11), torch.tensor([1e30])])


def fit_mean(fabric, data, **settings):
    model = Mean()
    result = fit(model, no_latents, SGVB(kl="sampled"), data, fabric=fabric, progress=False, **settings)
    return model.theta.item(), result


def check_bounds(fabric):
    """Return bounds and parameters of fits without noise."""
    still = partial(torch.optim.SGD, lr=0.0)
    _, told = fit_mean(fabric, TRAINED, num_epochs=1, batch_size=10, validation=HELD_OUT, optimizer=still)
    descend = partial(torch.optim.SGD, lr=1e-3)
    theta, _ = fit_mean(fabric, TRAINED, num_epochs=1, batch_size=27, optimizer=descend)
    return {"history": told.history[0], "num_steps": told.num_steps, "theta": theta}


def check_skipping(fabric):
    """Return what becomes of a row, which one process has, whose loss is infinite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theta, result = fit_mean(fabric, HUGE, num_epochs=3, batch_size=2, learning_rate=0.1)
        found = {"theta": theta, "num_skipped": result.num_skipped, "num_steps": result.num_steps}
        return found | {"error": error_of(lambda: fit_mean(fabric, HUGE, num_epochs=1, batch_size=6, max_skipped=0))}


def error_of(call):
    try:
        call()
    except AEVBError as error:
        return type(error).__name__, str(error)
    return None


class Latent:
    """Rows around one latent mean."""

    def model(self, x):
        g = pyro.sample("g", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        g = pyro.sample("g", dist.Normal(1.0, 0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + g) / 2, 0.8))


def latent_rows(count):
    return 1.0 + 2**0.5 * torch.randn(count, generator=torch.Generator().manual_seed(3))


def check_fits(fabric):
    """Return parameters and noise of whole fits of a guide that builds itself."""
    found = {}
    for name, seed in (("seed", 0), ("again", 0), ("no seed", None)):
        drawn = []
        vi = AEVB(Latent().model)
        result = vi.fit(
            latent_rows(45),
            num_epochs=3,
            batch_size=10,
            seed=seed,
            fabric=fabric,
            progress=False,
            compile=False,
            callbacks=[lambda event, drawn=drawn: drawn.append(torch.rand(()).item())],
        )
        own = {key: item.detach().clone() for key, item in vi.module.named_parameters()}
        found[name] = {"parameters": own, "drawn": drawn, "bounds": [record["bound"] for record in result.history]}
    stop = lambda event: fabric.global_rank == 1 and event.epoch == 2  # noqa: E731
    _, result = fit_mean(fabric, TRAINED, num_epochs=5, batch_size=10, callbacks=[stop])
    return found | {"stopped": (result.stopped_by, len(result.history))}


class Normalised(nn.Module):
    """A guide whose running statistics are those of the rows that it sees."""

    def __init__(self):
        super().__init__()
        self.norm, self.heads = nn.BatchNorm1d(1), nn.Linear(1, 2)

    def forward(self, x):
        loc, log_scale = self.heads(self.norm(x[:, None])).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def check_buffers(fabric):
    """Return running statistics after one step, and the posterior's draws of each process."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    torch.manual_seed(0)
    vi = AEVB(model, Normalised())
    vi.fit(latent_rows(20), num_epochs=1, batch_size=10, fabric=fabric, progress=False, compile=False)
    return {
        "mean": vi.guide.norm.running_mean.clone(),
        "variance": vi.guide.norm.running_var.clone(),
        "draws": vi.posterior(latent_rows(5), num_samples=3, seed=0)["z"],
        "own rows": latent_rows(20)[slice(*Processes(fabric).bounds(20))],
    }


EAGER = {"seed": 7, "compile": False, "progress": False}


def check_resuming(fabric):
    """Return parameters and bounds of a fit, and of one that was stopped and continued, for each kind of data."""
    rows = TensorDataset(latent_rows(45))
    loaders = {"loader": {"shuffle": True}, "sampler": {"sampler": SubsetRandomSampler(range(45))}}
    return {"tensor": resume(fabric, latent_rows(45), batch_size=10)} | {
        name: resume(fabric, DataLoader(rows, batch_size=10, **order)) for name, order in loaders.items()
    }


def resume(fabric, data, **settings):
    settings |= {"fabric": fabric, "progress": False, "compile": False}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(fabric.broadcast(own)) / "checkpoints"
        found = {}
        for name, num_epochs, more in (
            ("undisturbed", 4, {"seed": 0}),
            ("stopped", 2, {"seed": 0, "checkpoint": folder}),
            ("continued", 4, {"seed": 1, "checkpoint": folder, "resume": True}),
        ):
            vi = AEVB(Latent().model)
            result = vi.fit(data, num_epochs=num_epochs, **settings, **more)
            parameters = {key: item.detach().clone() for key, item in vi.module.named_parameters()}
            found[name] = {"parameters": parameters, "bounds": [record["bound"] for record in result.history]}
        fabric.barrier()
    return found


def check_inference(fabric):
    """Return what both processes find together, beside what one finds alone."""
    model, guide, x = Latent().model, Latent().guide, latent_rows(31)
    quick = {"num_samples": 40, "seed": 7}
    doors = {
        "posterior": partial(posterior, model, guide, x, **quick, chunk_size=4),
        "posterior of one chunk": partial(posterior, model, guide, x, **quick),
        "predict": partial(predict, model, guide, x, **quick, chunk_size=4),
        "embed": partial(embed, model, guide, x),
        "reconstruct": partial(reconstruct, model, guide, x),
        "importance": partial(
            log_marginal, model, guide, x, **quick, num_global_samples=3, chunk_size=4, progress=False
        ),
        "quadrature": partial(log_marginal, model, guide, x, method="quadrature", **EAGER),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = {name: (read(door(fabric=fabric)), read(door())) for name, door in doors.items()}
        unseeded = posterior(model, guide, x, num_samples=40, chunk_size=4, fabric=fabric)
    return pairs | {"no seed": unseeded}


def check_chains(fabric):
    """Return chains of both processes, beside those of one alone."""
    model, guide, x, given = Latent().model, Latent().guide, latent_rows(7), {"g": torch.tensor(1.0)}
    chains = {"num_chains": 4, "num_samples": 8, "warmup_steps": 8, "num_leapfrog": 2}
    doors = {
        "ais": partial(log_marginal, model, guide, x, method="ais", num_chains=4, num_temperatures=5, **EAGER),
        "hmc": partial(hmc_posterior, model, x, guide=guide, given=given, **chains, **EAGER),
        "hmc, learned length": partial(hmc_posterior, model, x, given=given, trajectory="chees", **chains, **EAGER),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: (read(door(fabric=fabric)), read(door())) for name, door in doors.items()}


def read(result):
    """Return the tensors of a result."""
    if isinstance(result, dict):
        return result
    names = ("value", "standard_error", "unconstrained", "log_joint", "r_hat")
    found = {name: getattr(result, name) for name in names if isinstance(getattr(result, name, None), torch.Tensor)}
    joint = getattr(result, "joint", None)
    return (
        found | dict(getattr(result, "samples", {})) | ({} if joint is None else {"joint": torch.tensor(joint.value)})
    )


class Idle(Mean):
    """A parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(()))


def check_refusals(fabric):
    """Return the errors for what can't be divided."""
    rows = latent_rows(12)
    sampler = [[0, 1], [2, 3, 4]]
    loader = DataLoader(TensorDataset(rows), batch_sampler=sampler)
    kept = DataLoader(TensorDataset(rows), batch_sampler=BatchSampler(SequentialSampler(rows), 4, False))
    again = DataLoader(TensorDataset(rows), batch_size=4, sampler=RandomSampler(rows, replacement=True, num_samples=5))
    run = partial(fit, fabric=fabric, progress=False, num_epochs=1)
    model = Latent().model
    return {
        "batches of one's own": error_of(lambda: run(Mean(), no_latents, SGVB(kl="sampled"), loader)),
        "batches of torch's": error_of(lambda: run(Mean(), no_latents, SGVB(kl="sampled"), kept)),
        "rows drawn again": error_of(lambda: run(Mean(), no_latents, SGVB(kl="sampled"), again)),
        "a guide of rows": error_of(lambda: run(model, AutoNormal(model), Trace_ELBO(), rows, batch_size=12)),
        "an idle parameter": error_of(lambda: run(Idle(), no_latents, SGVB(kl="sampled"), rows)),
    }


CHECKS = {
    "laws": check_laws,
    "batches": check_batches,
    "bounds": check_bounds,
    "skipping": check_skipping,
    "fits": check_fits,
    "buffers": check_buffers,
    "resuming": check_resuming,
    "inference": check_inference,
    "refusals": check_refusals,
}


def check_compiled(fabric):
    """Return parameters of a fit, compiled and not."""
    found = {}
    for name in (True, False):
        vi = AEVB(Latent().model, objective=SGVB())
        settings = {"num_epochs": 4, "batch_size": 10, "seed": 0, "learning_rate": 0.01, "progress": False}
        result = vi.fit(latent_rows(45), fabric=fabric, compile=name, **settings)
        own = {key: item.detach().clone() for key, item in vi.module.named_parameters()}
        found[name] = {"parameters": own, "execution": result.execution}
    return found


def endless(fabric, folder):
    """Train until something stops it, and tell what did."""
    (folder / f"pid{fabric.global_rank}").write_text(str(os.getpid()))

    def tell(event):
        (folder / f"epoch{fabric.global_rank}").write_text(str(event.epoch))

    try:
        fit_mean(fabric, TRAINED, num_epochs=10**9, batch_size=5, callbacks=[tell])
    except AEVBError as error:
        (folder / f"error{fabric.global_rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def main(what, folder):
    from datetime import timedelta

    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    torch.set_num_threads(1)
    seconds = float(os.environ.get("TIMEOUT", "300"))
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=seconds)))
    fabric.launch()
    if what == "endless":
        endless(fabric, folder)
        return
    checks = {"compiled": check_compiled, "chains": check_chains} if what == "slow" else CHECKS
    found = {}
    for name, check in checks.items():
        start = time.perf_counter()
        pyro.clear_param_store()
        found[name] = check(fabric)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    torch.save(found, folder / f"rank{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
