"""Whether a certificate holds: its counts, its samples, its model."""
