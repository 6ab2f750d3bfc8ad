"""Weights in and out, and checkpoints of a run: checked before anything is allocated, written whole."""
