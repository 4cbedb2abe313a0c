"""Matrices and their products, inverses and decompositions; nothing here knows a network."""
