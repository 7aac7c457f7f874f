"""Amortized guides that build themselves from a model: the protocol of Pyro's automatic guides, shared by all families."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_aevb._types import Args, Kwargs, PyroProgram, Values
from pyro_aevb.errors import GuideError, SettingError
from pyro_aevb.guides.amortized import Row
from pyro_aevb.guides.building import Built, Networks, build_networks, read_model
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.families import Circular, Diagonal, Family, Flow, FullCovariance, Spherical, neural_spline_flow
from pyro_aevb.guides.global_latents import GlobalGuide
from pyro_aevb.guides.probe import Reading
from pyro_aevb.guides.refinement import RefinableGuide
from pyro_aevb.program.batch import batch_rows
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
        if not isinstance(init_scale, int | float) or isinstance(init_scale, bool) or not init_scale > 0:
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
            built, example = read_model(self.model, self.data_plate, args, kwargs)
            self.networks = build_networks(self, self.model, built, example, (args, kwargs))
            self.prototype_trace = poutine.Trace()  # parts of an AutoGuideList are asked whether they have one
            for name, node in example.nodes.items():
                self.prototype_trace.add_node(name, **node)
            self._built = built
        return self

    @property
    def name(self) -> str:
        """Name of the guide's class."""
        return type(self).__name__

    @property
    def built(self) -> Built:
        """What was read from the model.

        Raises:
            GuideError: If the guide has not been built.
        """
        if self._built is None:
            raise GuideError("The guide is not built yet: call build(*batch) with one batch, or run it once.")
        return self._built

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
        row = Row(reading, values, self._supports(reading), networks.like)
        offsets = self.offsets(args, kwargs, reading.indices.get(built.structure.data_plate or ""))
        for name in built.order:
            with ExitStack() as stack:
                enter(stack, built.structure.sites[name])
                values[name] = pyro.sample(name, networks.of_locals(name, row, offsets.get(name)))
        return values

    def _supports(self, reading: Reading) -> dict[str, Constraint]:
        """Return the support of each latent; of those whose ends are computed from arguments that in this batch."""
        sites = self.built.structure.select("latent")
        supports = {site.name: site.support for site in sites}
        return supports | {name: reading.nodes[name]["fn"].support for name in self.built.moving_supports}

    def _read(self, args: Args, kwargs: Kwargs) -> tuple[dict[str, pyro.plate], Reading]:
        """Open the model's plates, on the model's own indices, and read the batch.

        A plate that chooses its rows by itself chooses them here, since the guide runs first, and the model is given the choice.
        """
        built = self.built
        master = self.master() if self.master is not None else None
        plates: dict[str, pyro.plate] = {} if master is None else dict(master.plates)
        for name, (size, count) in built.probe.drawn.items():
            if name not in plates:
                if count == built.rows and name == built.structure.data_plate:
                    count = batch_rows(args, kwargs) or count
                plates[name] = pyro.plate(name, size, subsample_size=count, dim=built.dims[name])
        indices = {name: plate._indices for name, plate in plates.items() if plate._indices is not None}
        drawn = {name: index for name, index in indices.items() if name in built.probe.drawn}
        reading = built.probe.read(args, kwargs, built.sources, drawn)
        for name, frame in reading.frames.items():
            if name not in plates and frame.dim is not None:
                plates[name] = _open_plate(frame, reading.indices.get(name))
        return plates, reading

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the list that the guide is part of. Pyro's own would unset the model of this object."""
        return {**self.__dict__, "master": None}


def _open_plate(frame: PlateFrame, index: Tensor | None) -> pyro.plate:
    if frame.size == frame.full_size:
        return pyro.plate(frame.name, frame.size, dim=frame.dim)
    return pyro.plate(frame.name, frame.full_size, subsample=index, dim=frame.dim)


def _check_encoder(encoder: object) -> None:
    """Refuse what is neither a module nor modules by site."""
    parts = list(encoder.values()) if isinstance(encoder, Mapping) else [] if encoder is None else [encoder]
    wrong = next((part for part in parts if not isinstance(part, nn.Module)), None)
    if wrong is not None:
        raise SettingError(
            f"encoder must be an nn.Module or a mapping from latent sites to modules, got {type(wrong).__name__}."
        )
