"""The exact curvature matrices: the oracle."""
