"""Checkpoints of other code: file formats, layouts of tensors, and the proof that a conversion is right."""
