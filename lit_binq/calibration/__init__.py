"""The calibration: one Lightning fit over sequential stages."""
