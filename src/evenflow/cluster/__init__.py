"""Clusters: which devices there are, what they can do, and how they are joined. No torch here."""
