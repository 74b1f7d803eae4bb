"""Work that the ranks of a run take in turn, with the same outcome on each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from legato import distributed
from legato.errors import LegatoError

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a piece of work gave, or why it gave nothing."""

    given: T | LegatoError

    def get(self) -> T:
        """Raises the LegatoError that the work ended with, whichever rank did it."""
        if isinstance(self.given, LegatoError):
            raise self.given
        return self.given


def in_turn(compute: Callable[[S], T], items: Sequence[S], *, together: bool) -> list[Outcome[T]]:
    """The outcome of each item, in their order. together: all ranks ask for the same items; every rank computes its
    share and gets all. Else this process computes them all by itself."""

    def outcome(item: S) -> Outcome[T]:
        try:
            return Outcome(compute(item))
        except LegatoError as error:
            return Outcome(error)

    if not together:
        return [outcome(item) for item in items]
    ranks = distributed.gather([outcome(item) for item in distributed.mine(items)])
    return [ranks[place % len(ranks)][place // len(ranks)] for place in range(len(items))]
