"""Deciding: where to cut."""
