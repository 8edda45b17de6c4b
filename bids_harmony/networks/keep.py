"""Results made of parameters alone, kept while the parameters stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Keeper:
    """Keeps what `make` makes of some tensors, until one of the tensors changes.

    A change is seen by the tensor's version counter and address, as the optimizer,
    `load_state_dict` and `to` change them; values written through `Tensor.data` are not seen.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Keeper:
        return Keeper()

    def __reduce__(self) -> tuple[type[Keeper], tuple[()]]:
        return Keeper, ()

    def forget(self) -> None:
        """Make everything anew next time."""
        self._kept.clear()

    def get(self, name: str, tensors: Iterable[Tensor], make: Callable[[], Made]) -> Made:
        """What `make` returns; made anew whenever gradients of the tensors are wanted."""
        of = list(tensors)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in of):
            return make()
        state = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in of]
        if name in self._kept and self._kept[name][0] == state:
            return self._kept[name][1]
        # Not inference tensors: they could not be used in a later pass with gradients.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        self._kept[name] = (state, made)
        return made
