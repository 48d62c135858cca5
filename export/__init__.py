"""Checkpoints in, verified bundles out. torch lives here and nowhere else."""
