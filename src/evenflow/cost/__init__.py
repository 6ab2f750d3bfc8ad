"""What each node of a recorded program costs, measured on the device."""
