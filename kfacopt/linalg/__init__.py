"""Matrices: linear operators for NumPy and torch, Kronecker products, inverses."""
