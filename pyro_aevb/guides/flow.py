"""Amortized guide with normalizing flows."""

from collections.abc import Callable, Mapping

from pyro.infer.autoguide import AutoGuide
from torch import nn

from pyro_aevb._types import PyroProgram
from pyro_aevb.guides.base import AmortizedGuide
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.families import Family, Flow, neural_spline_flow

__all__ = ["AutoAmortizedFlow"]

_NUM_CONTEXT = 32


class AutoAmortizedFlow(AmortizedGuide):
    r"""Amortized guide whose latents are normalizing flows on unconstrained space: any shape within a site.

    .. math:: z_i = T_i\big(m_i + s_i (\mu_i + L_i f(\epsilon; c_i))\big), \quad (\mu_i, L_i, c_i) = h_i(\mathrm{pa}(i))

    with f a Zuko flow of context :math:`c_i`, by default neural spline couplings (Durkan et al. 2019, arXiv 1906.04032); all else
    as in :class:`~pyro_aevb.AutoAmortizedNormal`. The affine map after the flow makes the family hold the multivariate normals.
    Globals get one flow over all of them.

    Arguments are those of :class:`~pyro_aevb.guides.base.AmortizedGuide`, and:

    Args:
        flow: Makes a Zuko flow with an invertible transform from the number of its features and of its context, such as
            ``zuko.flows.MAF`` or ``functools.partial(zuko.flows.NSF, transforms=5)``.

    Raises:
        SettingError: If a setting is not allowed or the flow has no invertible transform.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.norm(dim=-1), 0.1), obs=x)
        >>> guide = AutoAmortizedFlow(model).build(torch.rand(20))
        >>> guide(torch.rand(5))["z"].shape
        torch.Size([5, 2])
    """

    own_global_guide = "flow"

    def __init__(
        self,
        model: PyroProgram,
        *,
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        data_plate: str | None = "auto",
        global_guide: str | type[AutoGuide] | None = None,
        init_scale: float = 0.1,
        flow: Callable[[int, int], nn.Module] = neural_spline_flow,
    ) -> None:
        super().__init__(
            model, encoder=encoder, data_plate=data_plate, global_guide=global_guide, init_scale=init_scale
        )
        self.flow = flow

    def make_family(self, coordinates: Coordinates) -> Family:
        """Make a flow whose transformations depend on the row."""
        return Flow(coordinates, self.init_scale, self.flow, _NUM_CONTEXT)
