"""Checking the links of a machine: does each carry what it is given, how fast, and what helps where not."""
