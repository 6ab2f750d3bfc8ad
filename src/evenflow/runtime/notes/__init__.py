"""What is noted while a step runs, on one clock, for timelines, reports of failures and stragglers."""
