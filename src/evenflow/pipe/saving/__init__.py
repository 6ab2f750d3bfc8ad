"""A run's state, given out and taken back."""
