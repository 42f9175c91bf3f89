"""Packed folders: a quantized model on disk, and back."""
