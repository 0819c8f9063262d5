"""The ledger: which steps of which sessions a table has applied. It is table state that only records change."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from shardloss_server.shard.record import StepKey

KEPT_OUTCOMES = 16  # per session; a trainer repeats its last step, not one from long ago


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a step: the version after it and the staleness of its oldest part."""

    digest: bytes
    version: int
    staleness: int


@dataclass(slots=True)
class SessionSteps:
    """Steps of one session: the highest applied one and the outcomes of the last KEPT_OUTCOMES."""

    highest: int
    outcomes: OrderedDict[int, Outcome]


class Ledger:
    """The highest applied step and the last outcomes of each session, for at most max_sessions sessions.

    The session with the oldest last commit is forgotten first. Step numbers of a session only increase.
    """

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, SessionSteps] = OrderedDict()
        self.horizon = 0  # no forgotten session committed after this version

    def highest(self, session: str) -> int:
        """Return the highest applied step of a session; 0 if none is remembered."""
        known = self._sessions.get(session)
        return known.highest if known else 0

    def knows(self, session: str) -> bool:
        """Return True if a step of this session is remembered."""
        return session in self._sessions

    def outcome(self, session: str, step: int) -> Outcome | None:
        """Return the outcome of a step if it was applied and is among the last of its session, else None."""
        known = self._sessions.get(session)
        return known.outcomes.get(step) if known else None

    def note(self, key: StepKey, outcome: Outcome) -> None:
        """Remember an applied step.

        Raises:
            ValueError: the step is not above the session's highest; the caller checked it, so this is our own bug.
        """
        if key.step <= self.highest(key.session):
            raise ValueError(f"step {key.step} of session {key.session!r} is not above {self.highest(key.session)}")
        steps = self._sessions.setdefault(key.session, SessionSteps(key.step, OrderedDict()))
        steps.highest = key.step
        steps.outcomes[key.step] = outcome
        while len(steps.outcomes) > KEPT_OUTCOMES:
            steps.outcomes.popitem(last=False)
        self._sessions.move_to_end(key.session)
        while len(self._sessions) > self._max_sessions:
            _, forgotten = self._sessions.popitem(last=False)
            self.horizon = max(self.horizon, *(kept.version for kept in forgotten.outcomes.values()))
