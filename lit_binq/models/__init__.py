"""Hugging Face models: loading, their blocks, what blocks are called with, keys and values at few bits."""
