"""The demo: its model and texts, and the summary of its run."""
