"""The Trainer subclass and everything around a training run."""
