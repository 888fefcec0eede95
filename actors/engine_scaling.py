"""How many engines: one more while a step's sequences wait for them, one less while there is not enough for all.

The rule reads the work alone, no clock: the same run takes the same decisions. Which engine samples what never shows
in the samples, so neither does how many there are.
"""

from __future__ import annotations

QUEUE_LIMIT = 0.5
"""Full shares that may wait for each engine while it samples another one. With one engine more than that leaves none
without work, so that it is not taken back at once."""
STEPS_IN_A_ROW = 2
"""That must ask for the same before something is done."""


class Scaling:
    """One decision per step, within limits."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self.num_shares, self.num_engines = 0, least
        self._measured, self._streak = False, 0

    def note(self, num_shares: int, num_engines: int) -> None:
        """What the latest call came to: how many engines it could have filled, and how many there were."""
        self.num_shares, self.num_engines, self._measured = num_shares, num_engines, True

    @property
    def queue(self) -> float:
        """Full shares that wait for each engine."""
        return max(0.0, self.num_shares / self.num_engines - 1)

    def decide(self) -> int:
        """+1, -1 or 0 engines, at the end of a step."""
        wish = 0
        if self._measured and self.queue > QUEUE_LIMIT and self.num_engines < self.most:
            wish = 1
        elif self._measured and self.num_shares < self.num_engines and self.num_engines > self.least:
            wish = -1
        self._measured = False
        self._streak = wish + (self._streak if self._streak * wish > 0 else 0)
        if abs(self._streak) < STEPS_IN_A_ROW:
            return 0
        self._streak = 0
        return wish
