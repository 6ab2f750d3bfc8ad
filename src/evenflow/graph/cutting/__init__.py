"""Where a graph can be cut, what crosses a cut, and what is read from a graph: losses, uses of weights."""
