"""The one way in which blocking work gets off the event loop here."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class OffLoop(Protocol):
    """Runs blocking work beside the event loop, in a thread that exists already."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        """What `work` returns or raises."""
