"""From a checkpoint and its base to full weights: the adapter, the arithmetic, the writer."""
