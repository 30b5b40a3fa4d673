"""The speed benchmark: ours and its baselines on the same inputs, in one process."""
