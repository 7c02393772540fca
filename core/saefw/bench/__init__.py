"""Ratios of what saefw does to the hardware and to plain references."""
