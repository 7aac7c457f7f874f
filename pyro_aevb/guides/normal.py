"""Amortized guides with normals on unconstrained space: factorised, and with full covariance within each site."""

from pyro_aevb.guides.base import AmortizedGuide
from pyro_aevb.guides.coordinates import Coordinates
from pyro_aevb.guides.families import Diagonal, Family, FullCovariance

__all__ = ["AutoAmortizedMultivariateNormal", "AutoAmortizedNormal"]


class AutoAmortizedNormal(AmortizedGuide):
    r"""Amortized guide whose latents are independent normals on unconstrained space, within a site.

    .. math:: q(z | x, g) = \prod_i q(z_i | \mathrm{pa}(i)), \quad
              z_i = T_i\big(m_i + s_i (\mu_i + \sigma_i \epsilon)\big), \quad (\mu_i, \sigma_i) = f_i(\mathrm{pa}(i))

    (Kingma and Welling 2014, eq. 9, for any support and any directed model). The product runs over the model's sites; pa(i) are
    the observations, arguments, globals and earlier latents that screen z_i off from the rest (a faithful inverse: Webb et al.
    2018, arXiv 1712.00287), so that dependence between sites is kept and dependence within a site is not. T maps onto the
    support, m and s are median and spread of the prior, f is an encoder built from the model. Globals get independent normals.

    Arguments are those of :class:`~pyro_aevb.guides.base.AmortizedGuide`.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        ...         pyro.sample("x", dist.Poisson(z), obs=x)
        >>> guide = AutoAmortizedNormal(model).build(torch.tensor([0.0, 1.0, 4.0]))
        >>> guide(torch.tensor([2.0, 3.0]))["z"].shape
        torch.Size([2])
    """

    own_global_guide = "normal"

    def make_family(self, coordinates: Coordinates) -> Family:
        """Make independent normals."""
        return Diagonal(coordinates, self.init_scale)


class AutoAmortizedMultivariateNormal(AmortizedGuide):
    r"""Amortized guide whose latents are multivariate normals on unconstrained space: full covariance within a site.

    As :class:`AutoAmortizedNormal`, with a lower triangular :math:`L_i = \mathrm{diag}(\sigma_i) (I + 3 T_i)` in place of
    :math:`\sigma_i`; the encoder gives :math:`\sigma_i` and the D (D - 1) / 2 entries of :math:`T_i`, which is strictly lower
    triangular. Globals get one multivariate normal over all of them.

    Arguments are those of :class:`~pyro_aevb.guides.base.AmortizedGuide`.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> guide = AutoAmortizedMultivariateNormal(model).build(torch.randn(20))
        >>> guide(torch.randn(5))["z"].shape
        torch.Size([5, 3])
    """

    own_global_guide = "multivariate_normal"

    def make_family(self, coordinates: Coordinates) -> Family:
        """Make a multivariate normal."""
        return FullCovariance(coordinates, self.init_scale)
