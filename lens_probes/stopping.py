"""Long work that somebody may stop: it calls `may_stop` between its steps, and who waits for it can end it there.

stopped_by(check)   within it, `check` is called at each step; what it raises ends the work
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CHECK: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


@contextmanager
def stopped_by(check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` at each step of the work inside.

    >>> def stop():
    ...     raise InterruptedError("enough")
    >>> with stopped_by(stop):
    ...     may_stop()
    Traceback (most recent call last):
    InterruptedError: enough
    """
    token = _CHECK.set(check)
    try:
        yield
    finally:
        _CHECK.reset(token)


def may_stop() -> None:
    """A step is done; does nothing unless somebody asked to be told."""
    if check := _CHECK.get():
        check()
