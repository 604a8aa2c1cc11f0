"""From samples to certificates: the loop, its state, its plan, its interruptions."""
