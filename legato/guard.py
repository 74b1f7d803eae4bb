"""Steps that an SAE must not take, and when to give it up."""

import math
from dataclasses import dataclass

from legato.errors import LegatoError

# Gradient norms of good runs (30 recipes on three models) stay within 13 times their recent median.
EXPLODED = 100.0
SETTLING_STEPS = 20
AVERAGED_STEPS = 50
IN_A_ROW = 5
OF_ALL_STEPS = 0.05


@dataclass
class StepGuard:
    """Leaves out a step whose loss or gradient is not finite, or whose gradient norm is EXPLODED times the running mean
    of the good steps'; gives up after IN_A_ROW such steps in a row or OF_ALL_STEPS of the run's.

    A step left out changes nothing about the SAE, so what is left is always its last good state.
    """

    name: str
    steps: int
    good: int = 0
    skipped: int = 0
    in_a_row: int = 0
    typical_norm: float = 0.0

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, or None."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"loss {loss:.3g}, gradient norm {grad_norm:.3g}"
        if self.good >= SETTLING_STEPS and grad_norm > EXPLODED * self.typical_norm:
            return f"gradient norm {grad_norm:.3g} where {self.typical_norm:.3g} is usual"
        return None

    def accept(self, grad_norm: float) -> None:
        self.good += 1
        self.in_a_row = 0
        self.typical_norm += (grad_norm - self.typical_norm) / min(self.good, AVERAGED_STEPS)

    def skip(self, fault: str, step: int) -> None:
        """Raises LegatoError where this is one too many."""
        self.skipped += 1
        self.in_a_row += 1
        limit = min(IN_A_ROW, self.steps)
        if self.in_a_row >= limit or self.skipped > max(limit, OF_ALL_STEPS * self.steps):
            raise LegatoError(
                f"{self.name}: training diverged: {fault} at step {step}, {self.in_a_row} bad steps in a row and "
                f"{self.skipped} in all; lower --lr or the temporal coefficient"
            )
