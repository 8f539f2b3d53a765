"""From a user's pictures and texts to exact, resumable batches."""
