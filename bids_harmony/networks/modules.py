"""Lists of modules with a type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, cast

from torch import nn

Part = TypeVar("Part", bound=nn.Module)


class Modules(nn.ModuleList, Generic[Part]):
    """A `torch.nn.ModuleList` whose parts have a type."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__(parts)

    def __iter__(self) -> Iterator[Part]:
        return cast(Iterator[Part], super().__iter__())

    def __reversed__(self) -> Iterator[Part]:
        return iter(list(self)[::-1])
