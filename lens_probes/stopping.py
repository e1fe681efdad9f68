"""Long work that somebody may stop: it calls `may_stop` between its steps, and who waits for it can end it there.

`stopped_by(check)`: within it, `check(doing)` is called at each step, and what it raises ends the work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Check = Callable[[str], None]
_CHECK: ContextVar[Check | None] = ContextVar("check", default=None)


@contextmanager
def stopped_by(check: Check) -> Iterator[None]:
    """Calls `check` at each step of the work inside, with what is done next, or "" if that is as before.

    >>> def stop(doing):
    ...     raise InterruptedError(f"no {doing}")
    >>> with stopped_by(stop):
    ...     may_stop("LogitLens")
    Traceback (most recent call last):
    InterruptedError: no LogitLens
    """
    token = _CHECK.set(check)
    try:
        yield
    finally:
        _CHECK.reset(token)


def may_stop(doing: str = "") -> None:
    """Between two steps; does nothing unless somebody asked to be told."""
    if check := _CHECK.get():
        check(doing)
