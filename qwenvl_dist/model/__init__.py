"""Qwen2-VL: loading, the adapter, the loss."""
