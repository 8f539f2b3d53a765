"""Measurements beside the usual way of doing the same, in one run, so that the ratio holds on any machine."""
