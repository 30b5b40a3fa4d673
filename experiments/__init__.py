"""Experiments: data, models, training, and comparisons of dense with block-sparse attention."""
