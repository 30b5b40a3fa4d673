"""Tasks as tokens: how they are made or read, and how batches are drawn."""
