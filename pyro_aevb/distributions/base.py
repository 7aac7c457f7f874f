"""What the scalar families of this room share: parameters that broadcast, and draws by the inverse distribution function."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["InverseCDF", "Univariate"]


class Univariate(TorchDistribution):
    """A family on the line whose parameters, named in ``arg_constraints``, broadcast to the batch shape.

    Args:
        validate_args: Check parameters and values; ``None`` takes Pyro's setting.
        **parameters: Tensors or numbers by name.
    """

    has_rsample = True

    def __init__(self, *, validate_args: bool | None, **parameters: Tensor | float) -> None:
        tensors = broadcast_all(*parameters.values())
        for name, tensor in zip(parameters, tensors, strict=True):
            setattr(self, name, tensor)
        super().__init__(tensors[0].shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: "Univariate | None" = None) -> "Univariate":
        """Return the family with every parameter expanded to a batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(Univariate, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _checked(self, value: Tensor) -> Tensor:
        """Return a value, which lies in the support if arguments are validated."""
        if self._validate_args:
            self._validate_sample(value)
        return value


class InverseCDF(Univariate):
    r"""A family that is drawn by its inverse distribution function (Kingma & Welling 2013, arXiv 1312.6114, section 2.4, 1).

    .. math:: z = F^{-1}(1 - e^{-\epsilon}), \quad \epsilon \sim \mathrm{Exponential}(1)

    The noise is exponential and not uniform, since a uniform float32 can be 0 and comes no closer to 1 than 6e-8, which cuts the
    upper tail off.
    """

    @abstractmethod
    def _transform(self, noise: Tensor) -> Tensor:
        """Return z for given noise: the point that a draw exceeds with probability exp(-noise)."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
        """Draw; the gradient passes through the noise's transformation to the parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        parameter = getattr(self, next(iter(self.arg_constraints)))
        return self._transform(torch.empty(shape, dtype=parameter.dtype, device=parameter.device).exponential_())

    def icdf(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the quantile of a probability."""
        return self._transform(-torch.log1p(-value))
