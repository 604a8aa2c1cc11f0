"""From samples to certificates: the loop over samples, the bounds, the theorems, the files."""
