"""Is the adapter worth it: held-out rows asked of the base, of the base with a better prompt, and of the adapter."""
