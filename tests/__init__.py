"""Tests; the folders mirror `kit`."""
