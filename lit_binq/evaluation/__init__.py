"""Perplexity of a packed model beside its full-precision source."""
