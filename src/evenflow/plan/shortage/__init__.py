"""Where no plan fits: what is short, and what would help."""
