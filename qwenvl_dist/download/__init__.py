"""Bring a model, a dataset or a list of pictures onto this machine: pinned, checked, resumable."""
