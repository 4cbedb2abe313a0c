"""What happens in the user's loop, none of it changed; nothing here computes a statistic."""
