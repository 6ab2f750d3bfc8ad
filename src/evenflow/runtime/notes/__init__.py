"""What each op waits for and ends, and what is noted while a step runs, for timelines and reports."""
