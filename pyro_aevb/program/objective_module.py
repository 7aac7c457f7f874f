"""Model, guide and objective as one module whose call is the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_aevb._types import Args, Kwargs, PyroProgram
from pyro_aevb.errors import ParameterError
from pyro_aevb.program.batch import batch_rows, explained
from pyro_aevb.program.parameters import Program
from pyro_aevb.program.scaling import DataPlateScale, Shard
from pyro_aevb.program.settings import NumData
from pyro_aevb.program.structure import Structure, read_structure

__all__ = ["ObjectiveModule"]


class ObjectiveModule(nn.Module):
    """Model, guide and objective as one module whose call is the loss: minus the bound on the whole data set, in nats.

    Args:
        model: The model.
        guide: The guide.
        objective: Any ``pyro.infer.ELBO`` that has ``differentiable_loss``.
        num_data: Rows of the whole data set, for a data plate that knows only its batch; ``"growing"`` for those that :meth:`count`
            is told of; ``None`` guesses nothing.
        data_plate: As in :func:`~pyro_aevb.program.structure.read_structure`.
    """

    def __init__(
        self,
        model: PyroProgram,
        guide: PyroProgram,
        objective: ELBO,
        *,
        num_data: NumData = None,
        data_plate: str | None = "auto",
    ) -> None:
        super().__init__()
        self.program = Program(model, guide)
        self.objective: Any = objective
        # a hook that held this module would keep it alive in a cycle
        self.register_state_dict_pre_hook(lambda module, *_: module._check_built())
        self.objective_state = getattr(objective, "state", nn.Module())
        # outside of buffers: no part of the state, and not converted with it
        self._recorded_num_data: dict[torch.device, Tensor] = {}
        self.set_num_data(num_data)
        self.data_plate = data_plate
        self.shard: Shard | None = None
        self.structure: Structure | None = None
        self.example: tuple[Args, Kwargs] | None = None

    def set_num_data(self, num_data: NumData) -> None:
        """Set the number of rows, or let it grow from none."""
        self.is_growing = num_data == "growing"
        self.num_data: int | None = None if num_data == "growing" else num_data

    @property
    def num_data(self) -> int | None:
        """Rows of the whole data set, as far as they are known; a recorded graph reads them at each step."""
        return self._num_data

    @num_data.setter
    def num_data(self, num_data: int | None) -> None:
        self._num_data = num_data
        for held in self._recorded_num_data.values():
            held.fill_(num_data or 0)

    def hold_num_data(self) -> None:
        """Get ready to be recorded: the graph reads the number of rows from a tensor, where the parameters are.

        Pyro's own losses get it as a number, which their graphs hold.
        """
        if self.num_data is None or not hasattr(self.objective, "evaluate"):
            return
        device = self._device
        # numbers of rows are exact in float64, which Apple's GPUs lack
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._recorded_num_data.setdefault(device, torch.tensor(float(self.num_data), dtype=dtype, device=device))

    def count(self, rows: int) -> None:
        """Let the data set grow by rows that are seen, if it does."""
        if self.is_growing:
            self.num_data = (self.num_data or 0) + rows

    @contextmanager
    def counting(self, rows: int) -> Iterator[None]:
        """Count rows, unless the block fails on them."""
        before = self.num_data
        self.count(rows)
        try:
            yield
        except BaseException:
            self.num_data = before
            raise

    @property
    def model(self) -> PyroProgram:
        """The model, as given."""
        return self.program.model

    @property
    def guide(self) -> PyroProgram:
        """The guide, as given."""
        return self.program.guide

    def build(self, *args: Any, **kwargs: Any) -> "ObjectiveModule":
        """Make every parameter and read the model's structure from a batch; random state stays as it was."""
        self.example = (args, kwargs)
        with explained("program", args, kwargs), self.program.building():
            self.structure = read_structure(self.model, args, kwargs, guide=self.guide, data_plate=self.data_plate)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss on a batch."""
        if self.structure is None:
            self.build(*args, **kwargs)
        with self.running():
            return self.objective.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def loss_and_bound(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss on a batch and the bound in nats per row, detached.

        For Pyro's own losses, which give no bound per row, that is minus the loss over the rows that it stands for. In a batch
        that processes share (:meth:`sharing`), the mean of both over the processes is the loss and the bound of the whole batch.
        """
        evaluate = getattr(self.objective, "evaluate", None)
        with self.running():
            if evaluate is None:
                loss = self.objective.differentiable_loss(self.model, self.guide, *args, **kwargs)
                rows = self._rows(args, kwargs) if self.shard is None else self.shard.batch_rows
                return loss, -loss.detach() / (self._own_size or self.num_data or rows)
            loss, bounds = evaluate(self.model, self.guide, *args, **kwargs)
        rows = bounds.local.shape[0]
        share = 1.0 if self.shard is None else self.shard.share
        return loss, bounds.total * share / (bounds.scale * max(rows, 1))

    @contextmanager
    def sharing(self, shard: Shard | None) -> Iterator[None]:
        """Take the batches of a block as this process's part of batches that several share; ``None`` for batches of its own."""
        self.shard = shard
        try:
            yield
        finally:
            self.shard = None

    @property
    def scaling(self) -> tuple[int | str | None, Shard | None]:
        """What of the scale of rows a recorded graph holds, beside the batch: the number of rows only where it reads none."""
        is_read = self.num_data is not None and bool(self._recorded_num_data)
        return "read" if is_read else self.num_data, self.shard

    def held_out_bound(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the bound of rows that are not trained on, in nats per row.

        The globals' part is left out, but for Pyro's own losses, which do not tell it from the rows'.
        """
        bounds = getattr(self.objective, "bounds", None)
        if bounds is None:
            with self.program.running():
                loss = self.objective.differentiable_loss(self.model, self.guide, *args, **kwargs)
            return -loss / (self._own_size or self._rows(args, kwargs))
        with self.running():
            return bounds(self.model, self.guide, *args, **kwargs).local.mean()

    @property
    def _own_size(self) -> int | None:
        """Number of rows that the model itself gives its data plate, where it does."""
        structure = self.structure
        return None if structure is None or structure.full_size == structure.rows else structure.full_size

    @staticmethod
    def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return batch_rows(args, kwargs) or 1

    def running(self) -> Any:
        """Run model and guide with this module's parameters and scale."""
        plate = self.structure.data_plate if self.structure else None
        return self.program.running(DataPlateScale(plate, self._running_num_data(), self.shard))

    def _running_num_data(self) -> int | Tensor | None:
        """Return the number of rows, to a recording as the tensor that holds it."""
        if self.num_data is None or not self._recorded_num_data or not torch.compiler.is_compiling():
            return self.num_data
        return self._recorded_num_data.get(self._device, self.num_data)

    @property
    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter.

        Raises:
            ParameterError: If parameters may be missing because the programs have not run yet.
        """
        self._check_built()
        return super().named_parameters(*args, **kwargs)

    def _check_built(self) -> None:
        if self.program.may_lack_parameters:
            raise ParameterError(
                "Parameters are read before model and guide have run, and some may not exist yet (pyro.param in a function, a "
                "guide that builds itself). Call build(*batch) with one batch first."
            )
