"""What becomes of a gradient; nothing here knows where its curvature comes from."""
