"""Views: draw a schedule or a timeline, as text for a terminal or as a picture."""
