"""A process's parameters: where their numbers come from, how gradients become an update."""
