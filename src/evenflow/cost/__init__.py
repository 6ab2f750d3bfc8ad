"""What a recorded program costs on a device: measured, or estimated."""
