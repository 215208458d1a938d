"""Measurements of one part: cases, what is compared, how it is timed."""
