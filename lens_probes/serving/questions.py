"""Questions that wait for their turn: one is answered at a time, in a thread of its own, and none is kept for long.

A question is worked on as long as it is known. Who cancels it, or does not ask how far it is for `patience` seconds
(a tab that was closed), makes it unknown, and the work on it ends at its next step.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from secrets import token_urlsafe
from typing import Any, Literal

from lens_probes.messages import amount

WAITING = 8  # questions beside the one that is answered
KEPT = 16  # answers and errors that nobody has fetched yet
PATIENCE = 75.0  # seconds: browsers let a hidden tab ask once per minute

Step = Callable[[str, int, int], None]
"""Called before each part of the work with what is done now, its number and the number of parts."""


class Full(Exception):
    """Too many questions wait."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Question:
    """A question with its state; its id cannot be guessed, so that nobody else fetches or cancels it."""

    asked: Any
    id: str = field(default_factory=partial(token_urlsafe, 16))
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    doing: str = ""
    part: int = 0
    parts: int = 0
    error: str = ""
    answer: bytes = b""
    seen: float = field(default_factory=time.monotonic)


class Questions:
    """The questions of all tabs, in the order in which they came.

    >>> questions = Questions(lambda asked, step: asked.upper())
    >>> id = questions.ask(b"why?")
    >>> while questions.look(id)["state"] != "done":
    ...     time.sleep(0.01)
    >>> questions.take(id), questions.look(id)
    (b'WHY?', None)
    >>> questions.close()
    """

    def __init__(
        self,
        answer: Callable[[Any, Step], bytes],
        *,
        waiting: int = WAITING,
        kept: int = KEPT,
        patience: float = PATIENCE,
    ) -> None:
        self._answer = answer
        self._waiting, self._kept, self._patience = waiting, kept, patience
        self._known: dict[str, Question] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="lens_probes answers", daemon=True)
        self._worker.start()

    def __len__(self) -> int:
        return len(self._known)

    def ask(self, asked: Any) -> str:
        """Put a question at the end of the queue and return its id; raises `Full` if too many wait."""
        with self._changed:
            self._forget()
            waiting = len(self._of("waiting"))
            if waiting >= self._waiting:
                raise Full(f"at most {amount(self._waiting, 'question')} may wait; got one more: ask again in a moment")
            question = Question(asked)
            self._known[question.id] = question
            self._changed.notify_all()
        return question.id

    def look(self, id: str) -> dict[str, Any] | None:
        """How far a question is, for the page; None if it is not known (any more). An error is told once."""
        with self._changed:
            question = self._known.get(id)
            if question is None:
                return None
            question.seen = time.monotonic()
            if question.state == "failed":
                del self._known[id]
            ahead = 0
            if question.state == "waiting":
                ahead = self._of("waiting").index(question) + len(self._of("running"))
            told = {name: getattr(question, name) for name in ("state", "doing", "part", "parts", "error")}
            return {**told, "ahead": ahead}

    def take(self, id: str) -> bytes | None:
        """The answer, which is then forgotten; None if there is none."""
        with self._changed:
            question = self._known.get(id)
            if question is None or question.state != "done":
                return None
            return self._known.pop(id).answer

    def cancel(self, id: str) -> bool:
        """Forget a question, whether it waits, is being answered or is done; False if it is not known."""
        with self._changed:
            return self._known.pop(id, None) is not None

    def close(self) -> None:
        """Forget everything and end the thread, at the next step of the question in work."""
        with self._changed:
            self._closed = True
            self._known.clear()
            self._changed.notify_all()
        self._worker.join(timeout=10)

    def _of(self, state: str) -> list[Question]:
        return [question for question in self._known.values() if question.state == state]

    def _forget(self) -> None:
        """Drop what nobody asks for any more, and the oldest of too many answers."""
        late = time.monotonic() - self._patience
        finished = self._of("done") + self._of("failed")
        surplus = sorted(finished, key=lambda question: question.seen)[: max(0, len(finished) - self._kept)]
        for question in [each for each in self._known.values() if each.seen < late or each in surplus]:
            del self._known[question.id]

    def _next(self) -> Question | None:
        """The question whose turn it is, once there is one; None at the end."""
        with self._changed:
            while not self._closed:
                self._forget()
                if waiting := self._of("waiting"):
                    waiting[0].state = "running"
                    return waiting[0]
                self._changed.wait(self._patience)
        return None

    def _step(self, question: Question, doing: str, part: int, parts: int) -> None:
        with self._changed:
            self._forget()
            if question.id not in self._known:
                raise Cancelled
            question.doing, question.part, question.parts = doing, part, parts

    def _work(self) -> None:
        while question := self._next():
            answer, error = b"", ""
            try:
                answer = self._answer(question.asked, partial(self._step, question))
            except Cancelled:
                continue
            except (ValueError, TypeError) as refused:  # a sentence of this package
                error = str(refused)
            except Exception as failed:
                logging.getLogger(__name__).exception("a question failed")
                error = f"the question failed ({type(failed).__name__}): the terminal of the server says where"
            with self._changed:
                question.asked, question.answer, question.error = None, answer, error
                question.state = "failed" if error else "done"
                self._forget()
