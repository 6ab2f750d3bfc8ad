"""From a call tree to the nodes of a graph: which calls stay whole, and what each of them needs beside it."""
