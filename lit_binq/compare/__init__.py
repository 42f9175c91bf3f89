"""`litbinq compare`: a table of methods, every row a fit of its own."""
