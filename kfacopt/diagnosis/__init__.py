"""K-FAC beside the exact GGN on a user's own model: one call, one report."""
