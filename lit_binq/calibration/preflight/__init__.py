"""What a fit will ask and take, known before its first block."""
