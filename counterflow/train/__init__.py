"""Trains a model: one step, the run around it, its checkpoints and its report."""
