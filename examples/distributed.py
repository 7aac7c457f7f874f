r"""Groups of measurements around means of their own, fitted by one process or many.

Each of many groups has a mean theta_n ~ N(mu, tau); eight measurements scatter around it. mu and tau are latents of all groups,
each theta_n one of its own. Every process is given the same data, takes its part of each batch, and ends with the same parameters.

One process, or every GPU of the machine::

    python examples/distributed.py

Two processes on the CPU, started by Lightning Fabric, by torchrun, or by the script itself::

    fabric run --accelerator=cpu --devices=2 --strategy=ddp examples/distributed.py
    torchrun --nproc_per_node=2 examples/distributed.py --accelerator=cpu
    python examples/distributed.py --accelerator=cpu --devices=2

Four machines with eight GPUs each, on machine number RANK::

    fabric run --accelerator=cuda --devices=8 --num-nodes=4 --node-rank=RANK --main-address=HOST --strategy=ddp \
        examples/distributed.py
    torchrun --nproc_per_node=8 --nnodes=4 --node_rank=RANK --master_addr=HOST examples/distributed.py --accelerator=cuda
"""

import argparse
import os
from datetime import timedelta
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_aevb import AEVB

MU, TAU = 1.0, 2.0


def model(x: torch.Tensor) -> None:
    """Describe groups of measurements, one group a row."""
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        means = theta[..., None] * x.new_ones(x.shape[-1])
        pyro.sample("x", dist.Normal(means, 1.0).to_event(1), obs=x)


def simulate(num_groups: int) -> torch.Tensor:
    """Draw the same data in each process."""
    generator = torch.Generator().manual_seed(0)
    theta = MU + TAU * torch.randn(num_groups, 1, generator=generator)
    return theta + torch.randn(num_groups, 8, generator=generator)


def make_fabric(options: argparse.Namespace) -> Fabric:
    """Make the Fabric that flags, ``fabric run`` or ``torchrun`` ask for."""
    if "LT_CLI_USED" in os.environ:  # its flags are in the environment
        return Fabric()
    devices, num_nodes = options.devices, options.num_nodes
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    is_alone = devices in ("1", "auto") and options.accelerator == "cpu"
    # who waits longer than that for another process gives up
    strategy = "auto" if is_alone else DDPStrategy(timeout=timedelta(minutes=10))
    return Fabric(accelerator=options.accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", default="auto", help="processes of this machine, or 'auto' for each of its GPUs")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines")
    parser.add_argument("--groups", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--checkpoint", help="a folder that all machines see; a fit that was stopped continues from it")
    return parser.parse_args()


def main() -> None:
    """Fit, and print what the first process knows, as all do."""
    options = read_options()
    fabric = make_fabric(options)
    x = simulate(options.groups)
    vi = AEVB(model)
    result = vi.fit(
        x,
        num_epochs=options.epochs,
        batch_size=100,  # of each process
        learning_rate=0.02,
        schedule=partial(CosineAnnealingLR, T_max=options.epochs),
        seed=0,
        fabric=fabric,
        checkpoint=options.checkpoint,
        resume=options.checkpoint is not None,
    )
    fabric.print(f"{fabric.world_size} processes: {result}")

    draws = vi.posterior(x[:1000], num_samples=1000, seed=0, fabric=fabric)
    for name, truth in (("mu", MU), ("tau", TAU)):
        fabric.print(f"{name}: {draws[name].mean():.3f} +- {draws[name].std():.3f}, true value {truth}")
    exact = (x[:1000].sum(1) + MU / TAU**2) / (8 + 1 / TAU**2)
    error = (draws["theta"].mean(0).cpu() - exact).square().mean().sqrt()
    fabric.print(
        f"theta: rms error {error:.3f} of the posterior means, whose standard deviation is {(8 + 1 / TAU**2) ** -0.5:.3f}"
    )

    evidence = vi.log_marginal(x[:1000], num_samples=1000, seed=0, fabric=fabric, progress=False)
    fabric.print(f"log p of a group given mu and tau: {evidence.value.mean():.3f} nats on average")


if __name__ == "__main__":
    main()
