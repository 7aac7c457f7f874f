"""Amortized guides that build themselves from a model: the protocol of Pyro's automatic guides, shared by all families."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import DataError, GuideError, SettingError
from pyro_aevb.guides.amortized import Row
from pyro_aevb.guides.building import Built, Networks, build_networks, read_model
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.explaining import Explanation, explain, graph_text, write_graph
from pyro_aevb.guides.families import Circular, Diagonal, Family, Flow, FullCovariance, Spherical, neural_spline_flow
from pyro_aevb.guides.global_latents import GlobalGuide
from pyro_aevb.guides.probe import Reading
from pyro_aevb.guides.record import Record
from pyro_aevb.guides.refinement import RefinableGuide
from pyro_aevb.guides.summaries import marginal_quantiles, medians
from pyro_aevb.program.batch import batch_rows
from pyro_aevb.program.sites import plain_support
from pyro_aevb.program.structure import PlateFrame, Site

__all__ = ["AmortizedGuide"]

_GLOBAL_GUIDES = ("normal", "multivariate_normal", "flow")

Encoders = nn.Module | Mapping[str, nn.Module] | None


class AmortizedGuide(RefinableGuide):
    """Base of guides whose encoders are built from the model, in the protocol of :class:`pyro.infer.autoguide.AutoGuide`.

    A subclass chooses the family of each latent. The model is run at most five times when the guide is built, with one batch:
    at its first call, or by :meth:`build`.

    Args:
        model: The model.
        encoder: An ``nn.Module``, or modules by latent; each is called with the observations that the latent needs, one float
            tensor ``[rows, *event]`` or a dictionary of several, and returns ``[rows, features]``. By default encoders are made
            from the shapes of an example batch.
        data_plate: Name of the plate whose indices are rows; ``"auto"`` for the plate called "data", else the only outermost plate
            with as many indices as the batch has rows; ``None`` to treat the whole model as one row.
        global_guide: How latents outside the data plate are guided: ``"normal"``, ``"multivariate_normal"``, ``"flow"`` or one
            of Pyro's AutoGuide classes; by default the guide's own family, joint over all of them.
        init_scale: Scale of every latent at the start, in units of its prior.

    Raises:
        SettingError: If a setting is not allowed.
    """

    own_global_guide: str
    """What ``global_guide=None`` stands for."""

    def __init__(
        self,
        model: PyroProgram,
        *,
        encoder: Encoders = None,
        data_plate: str | None = "auto",
        global_guide: str | type[AutoGuide] | None = None,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(model)
        if not isinstance(init_scale, int | float) or isinstance(init_scale, bool) or not 0 < init_scale < inf:
            raise SettingError(f"init_scale must be a positive number, got {init_scale!r}.")
        _check_encoder(encoder)
        chosen = self.own_global_guide if global_guide is None else global_guide
        if isinstance(chosen, str) and chosen not in _GLOBAL_GUIDES:
            raise SettingError(
                f"global_guide must be one of {_GLOBAL_GUIDES} or a Pyro AutoGuide class, got {chosen!r}."
            )
        self.init_scale = float(init_scale)
        self.data_plate = data_plate
        self.global_guide = chosen
        self.__dict__["encoder"] = encoder  # registered with the other networks, when it is known what it reads
        self._built: Built | None = None
        self._record: Record | None = None

    def make_family(self, coordinates: Coordinates) -> Family:
        """Make the family of a local latent with given coordinates."""
        raise NotImplementedError

    def global_family(self, kind: str) -> Callable[[Coordinates], Family]:
        """Return what makes the joint family of the globals."""
        families: dict[str, Callable[[Coordinates], Family]] = {
            "normal": lambda own: Diagonal(own, self.init_scale),
            "multivariate_normal": lambda own: FullCovariance(own, self.init_scale),
            "flow": lambda own: Flow(own, self.init_scale, neural_spline_flow, num_context=0),
        }
        return families[kind]

    def choose_family(self, coordinates: Coordinates) -> Family:
        """Make the family of a latent: on circles and spheres theirs, else the guide's."""
        special = {"circle": Circular, "sphere": Spherical}.get(coordinates.kind)
        return self.make_family(coordinates) if special is None else special(coordinates, self.init_scale)

    def build(self, *args: Any, **kwargs: Any) -> "AmortizedGuide":
        """Read the model on a batch and make every parameter; a guide that is built stays as it is.

        Standardisation of inputs is computed from this batch, so that some hundred rows serve better than few.

        Returns:
            The guide.

        Raises:
            ModelError: If the model is not supported: a discrete latent, two plates that could be the rows, sites or supports
                that change from run to run, an event that no encoder takes.
            GuideError: If ``encoder`` does not fit the model.
        """
        if self._built is None:
            built, example = read_model(
                self.model, self.data_plate, args, kwargs, encoder=self.encoder, record=self._record
            )
            self.networks = build_networks(self, self.model, built, example, (args, kwargs))
            self.prototype_trace = poutine.Trace()  # parts of an AutoGuideList are asked whether they have one
            for site in built.structure.select("latent"):  # as Pyro's own, without the observations
                self.prototype_trace.add_node(site.name, **example.nodes[site.name])
            self._built = built
        return self

    @property
    def name(self) -> str:
        """Name of the guide's class."""
        return type(self).__name__

    @property
    def is_built(self) -> bool:
        """Whether the model has been read and every parameter made."""
        return self._built is not None

    @property
    def built(self) -> Built:
        """What was read from the model.

        Raises:
            GuideError: If the guide has not been built.
        """
        if self._built is None:
            raise GuideError("The guide is not built yet: call build(*batch) with one batch, or run it once.")
        return self._built

    @property
    def record(self) -> Record:
        """What was read off data, and off the model's parameters, when the guide was built.

        Raises:
            GuideError: If the guide has not been built.
        """
        built, inputs = self.built, self.networks.of_locals.inputs
        return Record(
            dependencies=built.dependencies,
            argument_plates=built.probe.argument_plates,
            nan_arguments=built.probe.nan_arguments,
            runs_model=built.probe.runs_model,
            moving_supports=built.moving_supports,
            asymmetric=built.asymmetric,
            uneven=built.uneven,
            apart=built.apart,
            inputs=tuple((item.scale, item.has_mask) for item in inputs),
            rows=built.rows,
        )

    def recall(self, record: Record) -> None:
        """Let the first batch build the guide as it was built when the record was made, whatever the batch holds."""
        self._record = record

    def forward(self, *args: Any, **kwargs: Any) -> Values:
        """Sample every latent, globals first, each given what screens it off from the rest.

        Args:
            *args: The batch, as positional arguments of the model.
            **kwargs: The batch, as keyword arguments of the model.

        Returns:
            ``{site: value}``.
        """
        self.build(*args, **kwargs)
        networks: Networks = self.networks  # one pyro.module statement, by which SVI finds the parameters
        built = self.built
        plates, reading = self._read(args, kwargs)

        def enter(stack: ExitStack, site: Site) -> None:
            for frame in site.frames:
                if frame.dim is not None:
                    stack.enter_context(plates[frame.name])
            if site.name in reading.masks:
                mask: Any = reading.masks[site.name]
                stack.enter_context(poutine.mask(mask=mask))

        values: Values = {}
        for part in networks.of_globals:
            values |= cast(GlobalGuide, part).sample(enter, args, kwargs)
        units = {name: pair for part in networks.of_globals for name, pair in cast(GlobalGuide, part).units().items()}
        row = Row(reading, values, self._supports(reading), units, networks.like)
        offsets = self.offsets(args, kwargs, reading.indices.get(built.structure.data_plate or ""))
        for name in built.order:
            with ExitStack() as stack:
                enter(stack, built.structure.sites[name])
                values[name] = pyro.sample(name, networks.of_locals(name, row, offsets.get(name)))
        return values

    def explain(self) -> Explanation:
        """Say how each latent is guided: its support, family, what it is given, and by which networks.

        Returns:
            A table that prints as text, a line for each latent; the steps of a series share one.

        Raises:
            GuideError: If the guide has not been built.

        Example:
            >>> from pyro_aevb import AutoAmortizedNormal
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            ...         pyro.sample("x", dist.Poisson(z), obs=x)
            >>> print(AutoAmortizedNormal(model).build(torch.tensor([0.0, 3.0])).explain())
            AutoAmortizedNormal: data plate 'data', 2 rows when it was built; ... parameters
            latent | support  | family | parents | observations | encoder
            -------+----------+--------+---------+--------------+-------------
            z      | (0, inf) | Normal | -       | x            | MLPEncoder 1
        """
        return explain(self.name, self.built, self.networks)

    def render(self, filename: str | Path | None = None) -> str:
        """Draw the guide's graph: what each latent is given, in the style of ``pyro.render_model``.

        Latents are white, observed sites grey, arguments boxes, plates clusters; a dashed edge, with the plates as its label, is
        from instances that are read together.

        Args:
            filename: Where to write it: text to a name ending in .dot or .gv, a picture to others if Graphviz is installed.

        Returns:
            The graph in Graphviz's language.

        Raises:
            GuideError: If the guide has not been built.
            SettingError: If a picture is asked for and Graphviz is not installed.
        """
        text = graph_text(self.built)
        if filename is not None:
            write_graph(text, filename)
        return text

    def median(self, *args: Any, **kwargs: Any) -> Values:
        """Return the median of each latent, each site given the medians of those before it.

        That is :func:`~pyro_aevb.embed` for one batch, in the shapes that the guide's own call returns. A family that maps a
        normal or a flow to a support gives the image of the base's median, those on circles and spheres their mean direction.

        Args:
            *args: The batch, as positional arguments of the model.
            **kwargs: The batch, as keyword arguments of the model.

        Returns:
            ``{site: value}``, without gradient. No noise is drawn, and outer handlers see nothing.
        """
        self.build(*args, **kwargs)
        return medians(self, args, kwargs)

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> Values:
        """Return quantiles of each latent's marginal distribution q(z | x), other latents averaged out.

        They are in closed form where a latent depends on no sampled one and its family is normal up to maps of each entry alone,
        else interpolated between order statistics of 1,000 joint draws under a fixed seed (a quantile at level p has a standard
        error of sqrt(p (1 - p) / 1000) in probability). Circles are cut at pi.

        Args:
            quantiles: Levels between 0 and 1.
            *args: The batch, as positional arguments of the model.
            **kwargs: The batch, as keyword arguments of the model.

        Returns:
            ``{site: [levels, *shape]}``, shapes as the guide's own call returns them, without gradient. Random generators stay as
            they were, and outer handlers see nothing.

        Raises:
            SettingError: If a level does not lie between 0 and 1.

        Example:
            >>> from pyro_aevb import AutoAmortizedNormal
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            ...         pyro.sample("x", dist.Poisson(z), obs=x)
            >>> AutoAmortizedNormal(model).quantiles([0.05, 0.5, 0.95], torch.tensor([0.0, 3.0]))["z"].shape
            torch.Size([3, 2])
        """
        self.build(*args, **kwargs)
        return marginal_quantiles(self, self.built, quantiles, args, kwargs)

    def _supports(self, reading: Reading) -> dict[str, Constraint]:
        """Return the support of each latent; of those whose ends are computed from arguments that in this batch."""
        sites = self.built.structure.select("latent")
        supports = {site.name: site.support for site in sites}
        return supports | {name: plain_support(reading.nodes[name]["fn"]) for name in self.built.moving_supports}

    def _read(self, args: Args, kwargs: Kwargs) -> tuple[dict[str, pyro.plate], Reading]:
        """Open the model's plates, on the model's own indices, and read the batch.

        A plate that chooses its rows by itself chooses them here, since the guide runs first, and the model is given the choice.
        """
        built = self.built
        if batch_rows(args, kwargs) == 0:
            raise DataError("The batch has no rows: expected at least one.")
        master = self.master() if self.master is not None else None
        plates: dict[str, pyro.plate] = {} if master is None else dict(master.plates)
        for name, (size, count) in built.probe.drawn.items():
            if name not in plates:
                if name == built.structure.data_plate:  # sized by the batch, if it was when the guide was built
                    rows = batch_rows(args, kwargs) or count
                    size, count = (rows if number == built.rows else number for number in (size, count))
                plates[name] = pyro.plate(name, size, subsample_size=count, dim=built.dims[name])
        indices = {name: plate._indices for name, plate in plates.items() if plate._indices is not None}
        drawn = {name: index for name, index in indices.items() if name in built.probe.drawn}
        reading = built.probe.read(args, kwargs, built.sources, drawn)
        for name, frame in reading.frames.items():
            if name in plates:
                _check_plate(plates[name], frame, reading.indices.get(name))
            elif frame.dim is not None:
                plates[name] = _open_plate(frame, reading.indices.get(name))
        return plates, reading

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the list that the guide is part of. Pyro's own would unset the model of this object."""
        for parameter in self.parameters():  # a weak reference of the param store, set anew each time it is asked
            vars(parameter).pop("unconstrained", None)
        return {**self.__dict__, "master": None}


def _open_plate(frame: PlateFrame, index: Tensor | None) -> pyro.plate:
    if frame.size == frame.full_size:
        return pyro.plate(frame.name, frame.size, dim=frame.dim)
    return pyro.plate(frame.name, frame.full_size, subsample=index, dim=frame.dim)


def _check_plate(plate: pyro.plate, frame: PlateFrame, index: Tensor | None) -> None:
    """Refuse a plate of a list of guides, made from its first batch, that does not hold the rows of this one."""
    own = plate._indices
    if plate.subsample_size == frame.size and (index is None or own is None or torch.equal(own.to(index), index)):
        return
    raise GuideError(
        f"The AutoGuideList opens the plate {frame.name!r} as its first batch had it, on {plate.subsample_size} of {plate.size} "
        f"indices, and the model has {frame.size} others in this batch. Give it the plates of each batch: AutoGuideList(model, "
        f"create_plates=lambda x: pyro.plate({frame.name!r}, len(x), dim={frame.dim}))."
    )


def _check_encoder(encoder: object) -> None:
    """Refuse what is neither a module nor modules by site."""
    parts = list(encoder.values()) if isinstance(encoder, Mapping) else [] if encoder is None else [encoder]
    wrong = next((part for part in parts if not isinstance(part, nn.Module)), None)
    if wrong is not None:
        raise SettingError(
            f"encoder must be an nn.Module or a mapping from latent sites to modules, got {type(wrong).__name__}."
        )
