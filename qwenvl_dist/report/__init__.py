"""One page about a run, made from what its folder holds."""
