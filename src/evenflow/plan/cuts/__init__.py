"""Where to cut a chain: exact for lines and Vs, by a heuristic that says its gap for loops."""
