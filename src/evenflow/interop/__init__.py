"""Other libraries' ways of working, with a pipeline inside; each is imported when it is used."""
