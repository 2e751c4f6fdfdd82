"""File formats: named tensors in files, whatever they are called, read one at a time."""
