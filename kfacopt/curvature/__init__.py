"""The exact curvature matrices: the oracle, which shares no code with `kfac` that it judges."""
