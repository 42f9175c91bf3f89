"""The two-plane format W(1+1)A(1xb)."""
