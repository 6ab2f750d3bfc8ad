"""What a pipeline is given, or decides itself: checked, and turned into stages, places, programs."""
