"""What Python tells a program beside its arguments (attributes, closures, globals), and how that is seen."""
