"""The command `litbinq`."""
