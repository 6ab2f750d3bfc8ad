"""Building: from what was asked to stages with their parameters, and to a plan where none was given."""
