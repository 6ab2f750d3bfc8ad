"""What steps took, and what of it is told: timelines, bills, gauges, logs."""
