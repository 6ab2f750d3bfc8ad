"""Searching for a plan: choices, estimated, then priced; the best are improved."""
