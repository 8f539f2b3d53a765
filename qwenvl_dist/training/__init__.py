"""The training loop, its step, its checkpoints."""
