"""Ranks: how processes find each other, what they add up, and the watchdog that ends them together."""
