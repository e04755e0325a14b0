"""Training state on disk: our own checkpoints, and nanochat's."""
