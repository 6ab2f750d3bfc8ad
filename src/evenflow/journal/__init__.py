"""The journal: what a run did, kept in its folder, and set beside its plan. Nothing here needs torch."""
