"""The size of the whole data set reaches a program's data plate."""

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message

__all__ = ["DataPlateScale"]


class DataPlateScale(Messenger):
    """Give a data plate that knows only its batch the size of the whole data set.

    Sites in the plate get the scale num_data / rows (arXiv 1312.6114, Eq 8). A plate that is sized or subsampled by the model,
    ``pyro.plate("data", 60_000, subsample_size=len(x))``, is left alone: it has its scale already.

    Args:
        data_plate: Name of the plate whose indices are rows; ``None`` leaves everything alone.
        num_data: Rows of the whole data set; ``None`` leaves everything alone.
    """

    def __init__(self, data_plate: str | None, num_data: int | None) -> None:
        super().__init__()
        self.data_plate = data_plate
        self.num_data = num_data

    def _pyro_sample(self, message: Message) -> None:
        if self.data_plate is None or self.num_data is None:
            return
        stack = message["cond_indep_stack"]
        for index, frame in enumerate(stack):
            if frame.name == self.data_plate and frame.full_size in (None, frame.size):
                message["scale"] = message["scale"] * (self.num_data / frame.size)
                sized = frame._replace(full_size=self.num_data)
                message["cond_indep_stack"] = (*stack[:index], sized, *stack[index + 1 :])
