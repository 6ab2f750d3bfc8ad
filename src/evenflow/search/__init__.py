"""Search: good orders of ops for given costs and memory caps.

A schedule is one *string* of *letters* for each rank; a letter is an op without its microbatch (`tables`). A
*strict* string holds every weight gradient, in a *lazy* one they are decoded into gaps (`timing`, which says
what a string costs: the *excess* of its worst rank over the longest work of all).

First strings come from schedules that are known, from *lists*, which greedily run what is ready after the
*taste* of a few numbers (`listing`, `seeds`, `tune`), from *merges* of forwards with input gradients
(`merge`), and from good strings for few microbatches, extended by their steady state (`extend`). They are
annealed by shifting letters (`anneal`). A *campaign* shares a budget between all that (`campaign`), an
`Engine` owns one instance's memory (`engine`), and `find` is the door. `translate` leads from and to
schedules.

The kernels are compiled (`compiled`), and work in place on arrays that are made once: what they write they
name in their docstrings. In arrays of numbers, -1 stands for nothing, and 1e300 for what cannot be.
"""
