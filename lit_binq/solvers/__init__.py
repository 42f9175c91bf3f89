"""Solvers: (T, H) -> a format. One method a file; they see nothing but a target and a metric."""
