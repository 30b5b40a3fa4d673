"""Experiments: data, models, training, and comparisons of dense with block-sparse attention."""

from sparse_flash.extras import require

require("matplotlib", "numba", "PIL", "tensorboard", "tqdm", "tyro", extra="experiments")
