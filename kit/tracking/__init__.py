"""Experiment trackers: Weights & Biases with all that the kit knows, the others through callbacks of transformers."""
