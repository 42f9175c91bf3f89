"""What was measured of a quantized block, and how."""
