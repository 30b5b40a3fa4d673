"""The speed benchmark: ours and its peers, side by side, on the same inputs, in one process."""
