"""A model's recordings: traced, found again by their key, and what their microbatches count for."""
