"""Fewer rows out of many: coresets by influence, and what influence is compared with."""
