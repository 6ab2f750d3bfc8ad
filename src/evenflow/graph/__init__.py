"""Recording what a program did, as data: the call tree, its leaves, the graph and its cuts."""
