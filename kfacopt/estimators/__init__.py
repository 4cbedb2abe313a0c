"""Estimators of what a matrix hides behind its products; nothing here knows a network."""
