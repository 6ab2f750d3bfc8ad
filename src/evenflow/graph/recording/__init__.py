"""Recording: the user's function runs, watched, and becomes a call tree. Begin with `record`."""
