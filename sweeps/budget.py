"""The budget of a sweep, in CPU-seconds: what was spent, what is left, what a trial may spend."""

import resource

# For closing the sweep: the last trial's model, figures and description.
RESERVE_CPU_SECONDS = 3.0
# No trial gets more than this share, so that even a small budget sees several trials.
GRANT_SHARE = 0.25


class Budget:
    """User and system time of this process and its ended children, since the process began.

    Imports, data preparation and tracking count: they are what a user waits and pays for.
    """

    def __init__(self, cpu_minutes: float) -> None:
        self.total = 60 * cpu_minutes

    def spent(self) -> float:
        """CPU-seconds spent so far."""
        usages = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def left(self) -> float:
        """CPU-seconds that trials may still spend."""
        return self.total - RESERVE_CPU_SECONDS - self.spent()

    def grant(self) -> float:
        """CPU-seconds that the next trial may spend."""
        return min(self.left(), GRANT_SHARE * self.total)
