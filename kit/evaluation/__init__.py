"""Measurements before, during and after training."""
