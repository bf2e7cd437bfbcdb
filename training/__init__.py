"""Data, losses, optimisers and the training loop."""
