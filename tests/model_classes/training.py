"""Train a guide on an entry of the registry and compare its posterior with the entry's reference."""

import math
import warnings
from typing import NamedTuple

import pyro
import torch
from model_classes.base import Batch, ModelClass
from torch import Tensor, nn

from pyro_aevb import SGVB, AutoAmortizedNormal
from pyro_aevb.errors import StagingWarning
from pyro_aevb.guides.base import AmortizedGuide
from pyro_aevb.program.batch import take_rows
from pyro_aevb.program.staging import record

ROWS, DRAWS, SEED = 20_000, 10_000, 77
CLIP = 100.0


class Distance(NamedTuple):
    """How far a guide's moments at one site lie from the reference, averaged over the elements that are compared.

    Attributes:
        mean: Of the posterior mean, in posterior standard deviations.
        log_sd: Of the logarithm of the standard deviation.
    """

    mean: float
    log_sd: float


def training_rows(entry: ModelClass) -> Batch:
    """Return what the guide is trained on: new rows, or the batch whose rows share globals."""
    return entry.batch() if entry.joint else entry.simulate(ROWS, seed=SEED)


def train(
    entry: ModelClass,
    guide: AmortizedGuide,
    *,
    num_steps: int,
    batch_size: int = 200,
    learning_rate: float = 1e-2,
    records: bool = True,
) -> None:
    """Take steps of Adam on the bound, the learning rate falling to 0 along half a cosine; joint batches are never cut."""
    args, kwargs = training_rows(entry)
    batch = (args, kwargs) if entry.joint else take_rows(args, kwargs, slice(batch_size))
    guide.build(*args, **kwargs)
    step = SGVB(data_plate=entry.data_plate)(entry.model, guide).build(*batch[0], **batch[1])
    if records and not kwargs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StagingWarning)  # what can't be recorded trains too
            step = record(step, *batch[0])
    optimizer = torch.optim.Adam(step.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(SEED)
    for index in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * index / num_steps)) / 2
        if not entry.joint:
            batch = take_rows(args, kwargs, torch.randint(len(args[0]), (batch_size,), generator=order))
        optimizer.zero_grad()
        step(*batch[0], **batch[1]).backward()
        if nn.utils.clip_grad_norm_(step.parameters(), CLIP).isfinite():  # else skipped, as by fit
            optimizer.step()


def distances(entry: ModelClass, guide: AmortizedGuide) -> dict[str, Distance]:
    """Compare moments of draws with the reference at every site; a Monte Carlo error of .01 standard deviations is left."""
    args, kwargs = entry.batch() if entry.joint else entry.test_batch()
    nesting = guide.build(*args, **kwargs).built.structure.max_plate_nesting
    with torch.no_grad(), pyro.plate("draws", DRAWS, dim=-1 - nesting):
        values = guide(*args, **kwargs)
    found = {}
    for site, reference in entry.reference.items():
        draws = entry.feature(site, values[site])
        mean, sd = (cut(moment, reference.mean.shape) for moment in (draws.mean(0), draws.std(0)))
        is_compared = entry.is_compared(site) & (reference.sd > 1e-6)
        errors = (mean - reference.mean) / reference.sd, (sd / reference.sd).log()
        found[site] = Distance(*(error.abs()[is_compared].mean().item() for error in errors))
    return found


def cut(moment: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Take the rows of a reference, whose shape lacks the plates that the site does not lie in."""
    while moment.dim() > len(shape):
        moment = moment.squeeze(0)
    return moment[tuple(slice(size) for size in shape)]


def trained(entry: ModelClass, kind: type[AmortizedGuide] = AutoAmortizedNormal, **settings) -> AmortizedGuide:
    """Return a trained guide."""
    guide = kind(entry.model, data_plate=entry.data_plate)
    train(entry, guide, **settings)
    return guide
