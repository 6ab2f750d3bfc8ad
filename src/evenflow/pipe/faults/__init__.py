"""Where numbers are wrong: a split step beside a whole one, and the first NaN of a step."""
