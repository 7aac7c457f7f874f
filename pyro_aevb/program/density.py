"""A model as a tensor function on unconstrained space, a density a row: the door of every sampler and estimator."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_aevb._types import PyroProgram, Values
from pyro_aevb.errors import ModelError, SettingError
from pyro_aevb.program.batch import as_tensors
from pyro_aevb.program.compiling import Compile, check_compile
from pyro_aevb.program.model_rows import ModelRows
from pyro_aevb.program.settings import as_values, check_count, check_covariates
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


@runtime_checkable
class Source(Protocol):
    """What a :class:`LogDensity` evaluates: rows of a batch.

    Attributes:
        dim: D, unconstrained coordinates of a row.
        dtype: Floating type of the latents.
        device: Where they live.
        chunk_rows: A fixed number of rows that each run needs, else ``None``.
    """

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    @property
    def structure(self) -> Structure | None:
        """The model's structure; ``None`` of plain functions."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    chunk_rows: int | None

    def evaluate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return log prior and log likelihood."""

    def constrain(self, u: Tensor) -> Values:
        """Carry u to the supports."""

    def unconstrain(self, values: Values) -> Tensor:
        """Undo :meth:`constrain`."""

    def draw_prior(self, num_draws: int, seed: int | None) -> Tensor:
        """Draw from the prior, each row the same whatever the others."""

    def select(self, index: slice | Tensor) -> "Source":
        """Return some of these rows."""

    def with_given(self, given: Values) -> "Source":
        """Return the same rows under other values of the globals."""


class LogDensity:
    r"""log p(x_n, z_n | g) of each row n as a pure function of unconstrained coordinates u, in nats.

    .. math:: \log p(x_n, u_n | g) = \log p(z_n | g) + \log |\partial z_n / \partial u_n| + \log p(x_n | z_n, g),
              \quad z_n = T(u_n)

    T is torch's bijection onto the supports, site by site in the model's order; angles (``VonMises``) lie in (-pi, pi). u is
    ``[*G, ..., rows, D]``: G are leading axes of the given globals, then any axes (chains, temperatures), which are evaluated at
    once. A masked latent keeps its prior, so that the density is proper; what is masked of the data does not count. Modules run
    in eval mode and their parameters are constants: gradients are with respect to u alone. Several evaluations cost several runs
    of the model, so that who wants prior and likelihood calls the density once.

    Args:
        model: The model.
        *batch: Rows, as positional arguments of the model; numpy arrays are accepted.
        data_plate: Name of the plate whose indices are rows, ``"auto"``, or ``None`` to treat the whole model as one row.
        given: Values of the model's globals, each with the same leading axes or none.
        compile: Whether evaluations with gradients are recorded and compiled for each shape of u: ``True`` at the first,
            ``"auto"`` after so many that it repays, ``False`` never. They then have no second derivatives.
        **covariates: The batch's keyword arguments.

    Raises:
        ModelError: If the model is not supported, rows are not independent, or a global is not given.
        DataError: If data hold NaN, or lie outside the likelihood's support.
        SettingError: If a value is given that is not the model's.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> density = LogDensity(model, torch.tensor([0.0, 3.0]))
        >>> u = torch.zeros(5, 2, density.dim)  # 5 chains of 2 rows
        >>> density(u).log_joint.shape, density.constrain(u)["rate"].shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        model: PyroProgram,
        *batch: Any,
        data_plate: str | None = "auto",
        given: Mapping[str, Tensor] | None = None,
        compile: Compile = False,  # noqa: A002  torch's own word
        **covariates: Any,
    ) -> None:
        check_covariates(covariates, LogDensity.__init__)
        check_compile(compile)
        tensors, values = as_tensors(batch, covariates), as_values(given)
        self.source: Source = ModelRows.of(model, tensors, data_plate, values, compile=compile)

    @classmethod
    def _of(cls, source: Source) -> "LogDensity":
        density = cls.__new__(cls)
        density.source = source
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
        functions = _Functions(log_prior, log_likelihood, draw_prior)
        return cls._of(_FunctionRows(functions, torch.arange(rows), rows, dim, like))

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.source.num_rows

    @property
    def dim(self) -> int:
        """D, number of unconstrained coordinates of a row."""
        return self.source.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the latents, and of u."""
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        """Where the latents live."""
        return self.source.device

    @property
    def structure(self) -> Structure | None:
        """The model's structure; ``None`` of plain functions."""
        return self.source.structure

    @property
    def chunk_rows(self) -> int | None:
        """A fixed number of rows that each run needs, else ``None``."""
        return self.source.chunk_rows

    def require_latents(self) -> None:
        """Refuse a model without latents of rows, which has no posterior of rows.

        Raises:
            ModelError: If there are none.
        """
        if not self.dim:
            raise ModelError(
                "The model has no latents of rows, so that there is no posterior of a row to draw from or to compare with: sample "
                "some inside the data plate without obs=; where all latents lie outside it, take the model as one row, "
                "data_plate=None."
            )

    def __call__(self, u: Float[Tensor, "*leading rows latent"]) -> Density:
        """Evaluate prior and likelihood in one run."""
        return Density(*self.source.evaluate(u))

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
        return self.source.constrain(u)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Float[Tensor, "*leading rows latent"]:
        """Undo :meth:`constrain`."""
        return self.source.unconstrain(dict(values))

    def draw_prior(self, num_draws: int, *, seed: int | None = None) -> Float[Tensor, "*globals draws rows latent"]:
        """Draw u from the prior; a row's draws under a seed are the same in whatever selection of rows it is."""
        check_count("num_draws", num_draws)
        return self.source.draw_prior(num_draws, seed)

    def rows(self, index: slice | Tensor) -> "LogDensity":
        """Select rows; what was read of the model is shared."""
        return self._of(self.source.select(index))

    def given(self, values: Mapping[str, Tensor]) -> "LogDensity":
        """Put other values of the globals, with any leading axes G: then u is ``[*G, ..., rows, D]``.

        Raises:
            ModelError: If a global is missing.
            SettingError: If a value is not the model's, or has a wrong shape.
        """
        return self._of(self.source.with_given(as_values(values)))


class _Functions(NamedTuple):
    """Two plain functions of all rows, and draws from the first."""

    log_prior: RowFunction
    log_likelihood: RowFunction
    draw: Callable[[int], Tensor] | None


class _FunctionRows:
    """Rows of two plain functions, a :class:`Source`."""

    def __init__(self, functions: _Functions, rows: Tensor, total: int, dim: int, like: Tensor) -> None:
        self.functions, self.rows, self.total, self.dim, self.like = functions, rows, total, dim, like
        self.dtype, self.device = like.dtype, like.device
        self.structure = None
        self.num_rows = len(rows)
        self.chunk_rows = total if total > 1 else None

    def evaluate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Call both functions on all rows, the first one asked for standing in for those that are not."""
        if u.dim() < 2 or tuple(u.shape[-2:]) != (self.num_rows, self.dim):
            raise SettingError(f"u must have shape [..., rows = {self.num_rows}, D = {self.dim}], got {list(u.shape)}.")
        if torch.equal(self.rows, torch.arange(self.total)):
            return self.functions.log_prior(u), self.functions.log_likelihood(u)
        rows = self.rows.to(u.device)
        places = torch.zeros(self.total, dtype=torch.long).index_copy(0, self.rows, torch.arange(self.num_rows))
        whole = u[..., places.to(u.device), :]
        return self.functions.log_prior(whole)[..., rows], self.functions.log_likelihood(whole)[..., rows]

    def constrain(self, u: Tensor) -> Values:
        """Return u, the only site."""
        return {"u": u}

    def unconstrain(self, values: Values) -> Tensor:
        """Return u, the only site."""
        return values["u"]

    def draw_prior(self, num_draws: int, seed: int | None) -> Tensor:
        """Call the user's function."""
        if self.functions.draw is None:
            raise SettingError("This density has no draws from its prior: give from_function(draw_prior=...).")
        with seeded(seed):
            return self.functions.draw(num_draws)[:, self.rows]

    def select(self, index: slice | Tensor) -> "_FunctionRows":
        """Return some of these rows.

        Raises:
            SettingError: If a row is asked for twice: the functions take each row once.
        """
        rows = self.rows[index]
        if len(rows.unique()) < len(rows):
            raise SettingError("A density of plain functions takes each of its rows once; a row was asked for twice.")
        return _FunctionRows(self.functions, rows, self.total, self.dim, self.like)

    def with_given(self, given: Values) -> "_FunctionRows":
        """Return itself: functions have no globals."""
        if given:
            raise SettingError(f"A density of plain functions has no globals, got values of {sorted(given)}.")
        return self
