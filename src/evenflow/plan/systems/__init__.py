"""Other systems: what they can express, and plans in their words."""
