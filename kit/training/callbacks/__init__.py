"""What happens during training, one callback a file."""
