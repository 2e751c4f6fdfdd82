"""Tokenizers and models."""
