"""Estimators of what a matrix hides behind its products: trace, diagonal, spectral density."""
