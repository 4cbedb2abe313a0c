"""Stock architectures in tiny configurations, each with a synthetic task."""
