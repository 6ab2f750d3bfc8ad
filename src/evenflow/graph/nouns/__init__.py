"""The nouns of a recorded program: values, nodes, the call tree, the graph. Read `tree`, then `graph`."""
