"""A section of the graph made ready to run: straight-line Python, keyed draws, a backward in parts."""
