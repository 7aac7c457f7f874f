"""App. F: variational Bayes over the decoder's weights too, beside maximum likelihood and MAP, where training digits are few."""

import math
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Adagrad

from benchmarks.paper.curves import Adagrads, obey, write_state
from benchmarks.paper.evidence import settings_of
from benchmarks.paper.models import make_vae
from benchmarks.paper.settings import BATCH_SIZE, INITIAL_SD, RATES, Curve, Job, load_images
from benchmarks.paper.tables import Row, merge, read_table, write_table
from benchmarks.programs import VAE
from pyro_aevb import AEVB, SGVB, log_marginal
from pyro_aevb.errors import AEVBWarning, NonFiniteError

__all__ = ["BayesianVAE", "run"]

_SAMPLES = 3e6
_HIDDEN, _LATENT, _NUM_TRAIN = 100, 3, 1_000
_TRIAL_SAMPLES = 50_000
_ROWS, _QUICK_ROWS = 100, 2
_GLOBAL_DRAWS = 10
_KINDS = ("ml", "map", "full_vb")


class BayesianVAE(nn.Module):
    r"""The autoencoder with a posterior over its decoder's weights, :math:`q(\theta) = N(\mu, \sigma^2)` under a prior N(0, I).

    Args:
        pixels: Pixels of an image.
        hidden: Hidden units of encoder and decoder.
        latent: Latents.
        num_data: Training rows, N.
        seed: Seed of the first means, N(0, 0.01), and of the encoder; standard deviations begin at 0.01.
    """

    def __init__(self, pixels: int, hidden: int, latent: int, num_data: int, seed: int = 0) -> None:
        super().__init__()
        self.latent, self.num_data = latent, num_data
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
        shapes = {"w1": (hidden, latent), "b1": (hidden,), "w2": (pixels, hidden), "b2": (pixels,)}
        self.locs = nn.ParameterDict({name: torch.empty(shape) for name, shape in shapes.items()})
        self.log_scales = nn.ParameterDict({name: torch.empty(shape) for name, shape in shapes.items()})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (*self.encoder.parameters(), *self.locs.parameters()):
                parameter.normal_(0.0, INITIAL_SD, generator=generator)
            for parameter in self.log_scales.parameters():
                parameter.fill_(math.log(INITIAL_SD))

    def model(self, x: Tensor) -> None:
        """Generate the decoder's weights, then images ``x``."""
        theta = {name: self._weights(name, dist.Normal(torch.zeros_like(loc), 1.0)) for name, loc in self.locs.items()}
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1))
            logits = _layer(torch.tanh(_layer(z, theta["w1"], theta["b1"])), theta["w2"], theta["b2"])
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample weights from q(theta), and latents from the encoder, which does not know the weights (App. F)."""
        pyro.module("vae", self)
        for name, loc in self.locs.items():
            self._weights(name, dist.Normal(loc, self.log_scales[name].exp()))
        loc, log_variance = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (log_variance / 2).exp()).to_event(1))

    @staticmethod
    def _weights(name: str, law: dist.Normal) -> Tensor:
        """Sample one array of weights."""
        return pyro.sample(name, law.to_event(len(law.batch_shape)))


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear map, or one map of each draw of the weights: ``[draws..., 1, out, in]`` over ``[draws..., rows, in]``."""
    if weight.dim() == 2:
        return linear(x, weight, bias)
    return x @ weight.squeeze(-3).mT + bias


def run(job: Job) -> None:
    """Train all three and write ``full_vb.csv``."""
    rows = read_table(job.state / "full_vb.csv")
    for kind in _KINDS if job.trains else ():
        if not any(row["kind"] == kind and row["samples"] >= job.samples(_SAMPLES) for row in rows):
            rows = merge(rows, [_measure(job, kind)], ("kind",))
            write_table(job.state / "full_vb.csv", rows)
            write_table(job.out / "full_vb.csv", rows)
    if rows:
        write_table(job.out / "full_vb.csv", rows)


def _curve(job: Job) -> Curve:
    """Return the data and the networks' sizes."""
    return job.shrink(Curve("mnist", _LATENT, "aevb", _HIDDEN, 200 if job.is_quick else _NUM_TRAIN))


def _measure(job: Job, kind: str) -> Row:
    """Train one of the three at the best rate, and judge it on new digits."""
    curve, num_samples, begin = _curve(job), job.samples(_SAMPLES), time.perf_counter()
    trials = {rate: _trial(curve, kind, rate, min(_TRIAL_SAMPLES, num_samples)) for rate in RATES}
    rate = max(trials, key=lambda rate: trials[rate])
    kept: dict[str, Any] = {"checkpoint": job.state / f"full_vb_{kind}", "every": 500, "keep": 1, "resume": True}
    vae, bound = _train(curve, kind, rate, num_samples, **kept)
    write_state(job.state / f"full_vb_{kind}.pt", vae.state_dict())
    images = load_images(curve.data, curve.num_train)
    test = images.test[: job.num_rows or (_QUICK_ROWS if job.is_quick else _ROWS)]
    draws = (2 if job.is_quick else _GLOBAL_DRAWS) if kind == "full_vb" else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AEVBWarning)  # flagged rows are counted in the table
        settings = {"num_global_samples": draws, "seed": 0, "progress": False, **settings_of(job, "bridge")}
        found = log_marginal(vae.model, vae.guide, test, method="bridge", **settings)
    row = {
        "kind": kind,
        "rate": rate,
        "samples": num_samples,
        "seconds": time.perf_counter() - begin,
        "train_bound": bound,
        "train_bound_without_weights": _local_bound(vae, images.train),
        "test_bound": _local_bound(vae, images.test),
        "test_log_marginal": float(found.value.mean()),
        "rows_error": float(found.value.std()) / len(test) ** 0.5,
        "rows": len(test),
        "flagged": int(found.is_flagged.sum()),
        "global_draws": draws,
    }
    sys.stderr.write(f"full_vb: {row}\n")
    return row


def _trial(curve: Curve, kind: str, rate: float, num_samples: int) -> float:
    """Return the bound after the first samples; minus infinity for a rate that diverges."""
    try:
        bound = _train(curve, kind, rate, num_samples)[1]
    except NonFiniteError:
        return -math.inf
    return bound if bound == bound else -math.inf


def _train(curve: Curve, kind: str, rate: float, num_samples: int, **settings: Any) -> tuple[VAE | BayesianVAE, float]:
    """Train and return the networks with the last epoch's bound, nats a row, the weights' KL included."""
    x = load_images(curve.data, curve.num_train).train
    vae: Any = make_vae(curve, x.shape[1])
    make: Any = Adagrads(vae, rate, encoder_decay=float(kind == "map"), decoder_decay=float(kind == "map"))
    if kind == "full_vb":
        vae, make = BayesianVAE(x.shape[1], curve.hidden, curve.latent, len(x), curve.seed), _adagrad(rate)
    vi = AEVB(vae.model, vae.guide, SGVB(), num_data=len(x))
    num_epochs = math.ceil(num_samples / len(x))
    result = vi.fit(
        x, num_epochs=num_epochs, batch_size=BATCH_SIZE, optimizer=make, seed=curve.seed, progress=False, **settings
    )
    sys.stderr.write(f"full_vb, {kind}, rate {rate}: {result}\n")
    obey(result.stopped_by)
    last = [record["bound"] for record in result.history[-10:]]
    return vae, sum(last) / len(last)


def _adagrad(rate: float) -> Any:
    """Return a maker of Adagrad without decay: the weights' prior is in the bound."""

    def make(parameters: Iterable[nn.Parameter]) -> Adagrad:
        return Adagrad(parameters, lr=rate)

    return make


def _local_bound(vae: VAE | BayesianVAE, x: Tensor, *, num_draws: int = 10) -> float:
    """Estimate the mean of E[log p(x, z | theta) - log q(z | x)] over rows, under the weights' posterior, nats."""
    objective = SGVB()
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        draws = [
            torch.cat([objective.bounds(vae.model, vae.guide, part).local for part in x.split(1_000)]).mean()
            for _ in range(num_draws)
        ]
    return float(torch.stack(draws).double().mean())
