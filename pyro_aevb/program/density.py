"""A model as a tensor function on unconstrained space, a density a row: the door of every sampler and estimator."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.program.settings import check_count
from pyro_aevb.program.structure import Structure
from pyro_aevb.randomness import seeded

__all__ = ["Density", "LogDensity"]

RowFunction: TypeAlias = Callable[[Tensor], Tensor]
"""From ``[..., rows, D]`` to ``[..., rows]``."""


class Density(NamedTuple):
    """Log density of rows at one u, in nats.

    Attributes:
        log_prior: Of the latents, with the log Jacobian of the map from u to their supports.
        log_likelihood: Of what is observed.
    """

    log_prior: Float[Tensor, "*leading rows"]
    log_likelihood: Float[Tensor, "*leading rows"]

    @property
    def log_joint(self) -> Float[Tensor, "*leading rows"]:
        """Their sum; -inf where either is, also where the other is inf."""
        total = self.log_prior + self.log_likelihood
        is_empty = (self.log_prior == -math.inf) | (self.log_likelihood == -math.inf)
        return total.masked_fill(is_empty, -math.inf)


class Source(Protocol):
    """What a :class:`LogDensity` evaluates: all rows of a whole batch, or a selection of them.

    Attributes:
        num_rows: Rows of the whole batch.
        dim: D, unconstrained coordinates of a row.
        dtype: Floating type of the latents.
        device: Where they live.
        structure: The model's structure; ``None`` of a plain function.
        chunk_rows: A fixed number of rows that each run needs, else ``None``.
    """

    num_rows: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    structure: Structure | None
    chunk_rows: int | None

    def evaluate(self, u: Tensor, rows: Tensor, given: Values) -> tuple[Tensor, Tensor]:
        """Return log prior and log likelihood of some rows."""

    def constrain(self, u: Tensor, rows: Tensor, given: Values) -> Values:
        """Carry u to the supports."""

    def unconstrain(self, values: Values, rows: Tensor, given: Values) -> Tensor:
        """Undo :meth:`constrain`."""

    def draw_prior(self, num_draws: int, seed: int | None, rows: Tensor, given: Values) -> Tensor:
        """Draw ``[num_draws, rows, D]``, each row the same whatever the others."""


class LogDensity:
    r"""log p(x_n, z_n | g) of each row n as a pure function of unconstrained coordinates u, in nats.

    .. math:: \log p(x_n, u_n | g) = \log p(z_n | g) + \log |\partial z_n / \partial u_n| + \log p(x_n | z_n, g),
              \quad z_n = T(u_n)

    T is torch's bijection onto the supports, site by site in the model's order. u is ``[*G, ..., rows, D]``: G are leading axes of
    the given globals, then any axes (chains, temperatures), which are evaluated at once.

    Args:
        model: The model.
        *batch: Rows, as positional arguments of the model.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None`` to treat the whole model as one row.
        given: Values of the model's globals, each with the same leading axes or none.
        **covariates: The batch's keyword arguments.

    Raises:
        ModelError: If the model is not supported, rows are not independent, or a global is not given.
        DataError: If data hold NaN, or lie outside the likelihood's support.
        SettingError: If a value is given that is not the model's.
    """

    def __init__(
        self,
        model: PyroProgram,
        *batch: Any,
        data_plate: str | None = "auto",
        given: Mapping[str, Tensor] | None = None,
        **covariates: Any,
    ) -> None:
        raise ModelError("Densities of models are not read yet; use LogDensity.from_function.")

    @classmethod
    def _of(cls, source: Source, rows: Tensor, given: Values) -> "LogDensity":
        density = cls.__new__(cls)
        density._source, density._rows, density._given = source, rows, given
        return density

    @classmethod
    def from_function(
        cls,
        log_prior: RowFunction,
        log_likelihood: RowFunction,
        dim: int,
        *,
        rows: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        draw_prior: Callable[[int], Tensor] | None = None,
    ) -> "LogDensity":
        """Make a density of two plain functions, from u ``[..., rows, dim]`` to ``[..., rows]`` in nats.

        Args:
            log_prior: Log density that annealing may start from.
            log_likelihood: What is added to it.
            dim: Coordinates of a row.
            rows: Number of rows; the functions are always called with all of them.
            dtype: Floating type of u; by default torch's.
            device: Where u lives.
            draw_prior: From a number of draws to exact draws ``[draws, rows, dim]`` of the prior, for those who start there.

        Raises:
            SettingError: If ``dim`` or ``rows`` is no integer of at least 1.

        Example:
            >>> normal = dist.Normal(0.0, 1.0)
            >>> density = LogDensity.from_function(
            ...     lambda u: normal.log_prob(u).sum(-1), lambda u: -u.square().sum(-1), dim=2)
            >>> density.log_joint(torch.zeros(4, 1, 2)).shape
            torch.Size([4, 1])
        """
        check_count("dim", dim)
        check_count("rows", rows)
        like = torch.empty(0, dtype=dtype, device=device)
        source = _Functions(log_prior, log_likelihood, dim, rows, like, draw_prior)
        return cls._of(source, torch.arange(rows), {})

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @property
    def dim(self) -> int:
        """D, number of unconstrained coordinates of a row."""
        return self._source.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the latents, and of u."""
        return self._source.dtype

    @property
    def device(self) -> torch.device:
        """Where the latents live."""
        return self._source.device

    @property
    def structure(self) -> Structure | None:
        """The model's structure; ``None`` of plain functions."""
        return self._source.structure

    @property
    def chunk_rows(self) -> int | None:
        """A fixed number of rows that each run needs, else ``None``."""
        return self._source.chunk_rows

    def __call__(self, u: Float[Tensor, "*leading rows latent"]) -> Density:
        """Evaluate prior and likelihood in one run."""
        return Density(*self._source.evaluate(u, self._rows, self._given))

    def log_prior(self, u: Float[Tensor, "*leading rows latent"]) -> Float[Tensor, "*leading rows"]:
        """Return the latents' log density, with the Jacobian, in nats."""
        return self(u).log_prior

    def log_likelihood(self, u: Float[Tensor, "*leading rows latent"]) -> Float[Tensor, "*leading rows"]:
        """Return the log density of what is observed, in nats."""
        return self(u).log_likelihood

    def log_joint(self, u: Float[Tensor, "*leading rows latent"]) -> Float[Tensor, "*leading rows"]:
        """Return the sum of both, in nats; -inf where either is."""
        return self(u).log_joint

    def constrain(self, u: Float[Tensor, "*leading rows latent"]) -> Values:
        """Carry u to the latents' supports: ``{site: [..., rows, inner plates, *event]}``."""
        return self._source.constrain(u, self._rows, self._given)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Float[Tensor, "*leading rows latent"]:
        """Undo :meth:`constrain`."""
        return self._source.unconstrain(dict(values), self._rows, self._given)

    def draw_prior(self, num_draws: int, *, seed: int | None = None) -> Float[Tensor, "draws rows latent"]:
        """Draw u from the prior; a row's draws under a seed are the same in whatever selection of rows it is."""
        check_count("num_draws", num_draws)
        return self._source.draw_prior(num_draws, seed, self._rows, self._given)

    def rows(self, index: slice | Tensor) -> "LogDensity":
        """Select rows; what was read of the model is shared."""
        return self._of(self._source, self._rows[index], self._given)


class _Functions:
    """Two plain functions of all rows."""

    def __init__(
        self,
        log_prior: RowFunction,
        log_likelihood: RowFunction,
        dim: int,
        rows: int,
        like: Tensor,
        draw: Callable[[int], Tensor] | None,
    ) -> None:
        self.log_prior, self.log_likelihood, self._draw = log_prior, log_likelihood, draw
        self.num_rows, self.dim = rows, dim
        self.dtype, self.device = like.dtype, like.device
        self.structure = None
        self.chunk_rows = rows if rows > 1 else None

    def evaluate(self, u: Tensor, rows: Tensor, given: Values) -> tuple[Tensor, Tensor]:
        """Call both functions on all rows, the first standing in for rows that are not asked for."""
        if len(rows) == self.num_rows:
            return self.log_prior(u), self.log_likelihood(u)
        places = torch.zeros(self.num_rows, dtype=torch.long).index_copy(0, rows, torch.arange(len(rows)))
        whole = u[..., places, :]
        return self.log_prior(whole)[..., rows], self.log_likelihood(whole)[..., rows]

    def constrain(self, u: Tensor, rows: Tensor, given: Values) -> Values:
        """Return u, the only site."""
        return {"u": u}

    def unconstrain(self, values: Values, rows: Tensor, given: Values) -> Tensor:
        """Return u, the only site."""
        return values["u"]

    def draw_prior(self, num_draws: int, seed: int | None, rows: Tensor, given: Values) -> Tensor:
        """Call the user's function."""
        if self._draw is None:
            raise SettingError("This density has no draws from its prior: give from_function(draw_prior=...).")
        with seeded(seed):
            return self._draw(num_draws)[:, rows]
