"""The optimizer that trains with K-FAC; exact curvature to check it by is in `curvature`."""
