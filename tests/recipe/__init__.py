"""Tests of kit/recipe."""
