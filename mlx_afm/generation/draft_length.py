"""How many tokens a draft model proposes: what gives most tokens per time, or none where plain steps are faster.

What decides are measured times (of plain steps, and of rounds by their number of proposals) and the share of proposals
that each row accepted lately. Every row has a budget of time that it may lose against plain decoding.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from weakref import WeakKeyDictionary

LENGTHS = (1, 2, 4, 8, 16)
DECAY = 0.9  # weight of earlier rounds in a share, per round
PRIOR_TRIES = 3.0
SLACK_STEPS = 4.0  # plain steps that a row may lose at first
SLACK_SHARE = 0.02  # and of its answer
PROBE_LENGTH, PROBE_ROUNDS = 2, 2  # at the very beginning, and of a draft that does not pay now and then
USUALLY_MISSING = 2  # tokens that the draft reads in each round
PROBE_STEPS = (16, 1024)  # between probes: doubled each time, from and up to
SAMPLES, ENOUGH_SAMPLES, MAX_AGE_STEPS = 9, 2, 256  # measured times that count


@dataclass(eq=False)
class Acceptance:
    """The share of a row's proposals that are accepted.

    Attributes:
        hits, tries: accepted and judged ones, earlier ones counting less; what follows a refused one was not judged.
        lead_steps: tokens given, beyond those that plain steps would have given in the same time, and the slack.
    """

    hits: float = 2 / 3 * PRIOR_TRIES
    tries: float = PRIOR_TRIES
    lead_steps: float = SLACK_STEPS

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.hits / self.tries

    def add(self, drafted: int, accepted: int) -> None:
        """Counts a round."""
        self.hits = DECAY * self.hits + accepted
        self.tries = DECAY * self.tries + min(accepted + 1, drafted)

    def tokens(self, length: int) -> float:
        """Tokens that a round of so many proposals is expected to give."""
        return sum(self.share**count for count in range(length + 1))


@dataclass(frozen=True)
class _Step:
    """A step whose time is being taken; what it gave each row, if it was a round."""

    started: float
    rows: Sequence[Hashable]
    length: int
    counts: bool
    missing: int
    given: Sequence[int] = ()


class DraftLength:
    """Chooses the number of proposals before each step, and is told what came of it.

        length = lengths.plan(rows)           0: a plain step
        lengths.start(rows, length)
        lengths.add(rows, drafted, accepted)  after a round
        lengths.finish()                      when the next step begins

    Args:
        draft_cost: the draft's time of a token in the target's, assumed until a round was timed.
        clock: gives seconds.
    """

    def __init__(self, draft_cost: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._draft_cost, self._clock = draft_cost, clock
        self._common = Acceptance()
        self._rows: WeakKeyDictionary[Hashable, Acceptance] = WeakKeyDictionary()
        self._seconds: dict[tuple[int, int], deque[tuple[int, float]]] = {}
        self._steps = self._last_round = self._trials = 0
        self._probe_steps, self._probe_rounds = PROBE_STEPS[0], 0
        self._reading_seconds: deque[float] = deque(maxlen=SAMPLES)  # of each missing token
        self._step: _Step | None = None

    def plan(self, rows: Sequence[Hashable], missing: int = 0) -> int:
        """How many tokens to propose to these rows now; 0 for a plain step.

        Args:
            rows: of the batch.
            missing: tokens of a row that the draft has yet to read, after plain steps; each costs time.
        """
        self._steps += 1
        plain = self._measured(len(rows), 0)
        if plain is None:
            self._trials += 1
            return PROBE_LENGTH if self._trials <= PROBE_ROUNDS else 0
        shares = [self._row(row) for row in rows]

        def rate(length: int) -> float:
            return sum(share.tokens(length) for share in shares) / self._estimated(len(rows), length, plain)

        best = max((0, *LENGTHS), key=rate)
        if best:
            self._probe_steps, self._probe_rounds = PROBE_STEPS[0], 0
        elif self._is_probe():
            best = PROBE_LENGTH
        reading = missing * median(self._reading_seconds) if self._reading_seconds else 0.0
        steps = (self._estimated(len(rows), best, plain) + reading) / plain
        if best and any(share.lead_steps + share.tokens(best) < steps for share in shares):
            return 0
        return best

    def start(self, rows: Sequence[Hashable], length: int, *, counts: bool = True, missing: int = 0) -> None:
        """A step begins.

        Args:
            rows, length: of the step.
            counts: False for a step that is longer for other reasons: it is not taken as a measure.
            missing: see `plan`; a round in which the draft reads more than it usually does is no measure either.
        """
        counts = counts and missing <= USUALLY_MISSING
        self._step = _Step(self._clock(), list(rows), length, counts, missing)
        if length:
            self._last_round = self._steps

    def add(self, rows: Sequence[Hashable], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """What a round came to, by row."""
        for row, tries, hits in zip(rows, drafted, accepted):
            if tries:
                self._row(row).add(tries, hits)
        if any(drafted):
            self._common.add(sum(drafted) / len(rows), sum(accepted) / len(rows))  # type: ignore[arg-type]
        if self._step is not None:
            self._step = replace(self._step, given=[1 + hit for hit in accepted])

    def finish(self) -> None:
        """The step is over: the next one begins."""
        step, self._step = self._step, None
        if step is None:
            return
        seconds = self._clock() - step.started
        key = _bucket(len(step.rows)), step.length
        plain, known = self._measured(len(step.rows), 0), key in self._seconds
        if step.counts:
            # The first of a kind may have compiled kernels.
            self._seconds.setdefault(key, deque(maxlen=SAMPLES))
            if known:
                self._seconds[key].append((self._steps, seconds))
        expected = None if plain is None else self._estimated(len(step.rows), step.length, plain)
        if expected is not None and step.missing > USUALLY_MISSING:
            self._reading_seconds.append(max(seconds - expected, 0.0) / step.missing)
        for number, row in enumerate(step.rows):
            share = self._row(row)
            share.lead_steps += SLACK_SHARE * (step.given[number] if step.given else 1)
            if step.given and plain is not None and expected is not None:
                lost = seconds  # with what the draft had to read
                if step.counts:
                    lost = min(seconds, 4 * expected) if known else expected
                share.lead_steps += step.given[number] - lost / plain

    def abandon(self) -> None:
        """The step's time is not to be taken."""
        self._step = None

    def _row(self, row: Hashable) -> Acceptance:
        if row not in self._rows:
            self._rows[row] = Acceptance(PRIOR_TRIES * self._common.share)
        return self._rows[row]

    def _is_probe(self) -> bool:
        if self._probe_rounds:
            self._probe_rounds -= 1
            return True
        if self._steps - self._last_round < self._probe_steps:
            return False
        self._probe_steps = min(2 * self._probe_steps, PROBE_STEPS[1])
        self._probe_rounds = PROBE_ROUNDS - 1
        return True

    def _measured(self, rows: int, length: int) -> float | None:
        """Seconds of a step, if enough were timed lately."""
        held = self._seconds.get((_bucket(rows), length), ())
        recent = [seconds for step, seconds in held if self._steps - step <= MAX_AGE_STEPS]
        enough = ENOUGH_SAMPLES if length == 0 else 1
        return median(recent) if len(recent) >= enough else None

    def _estimated(self, rows: int, length: int, plain: float) -> float:
        """Seconds of a step; of one that was not timed, by what a proposal took in the nearest one that was."""
        if length == 0:
            return plain
        timed = {other: found for other in LENGTHS if (found := self._measured(rows, other)) is not None}
        if length in timed:
            return timed[length]
        if not timed:
            return plain * (1 + self._draft_cost * length)
        nearest = min(timed, key=lambda other: abs(other - length))
        return plain + max(timed[nearest] - plain, 0.0) * length / nearest


def _bucket(rows: int) -> int:
    """The number of rows that times are told apart by: 1, 2, 4, 8, ..."""
    return 1 << max(rows - 1, 0).bit_length()
