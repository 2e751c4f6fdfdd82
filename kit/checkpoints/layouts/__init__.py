"""Layouts: how one architecture's tensors are named and turned, one file each, in tables that run both ways."""
