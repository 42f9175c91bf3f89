"""From activations to what solvers minimise: Grams, targets, input formats."""
