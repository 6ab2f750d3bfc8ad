"""Stages, and the executor that drives them through a proven program."""
