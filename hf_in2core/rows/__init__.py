"""Rows: where they come from, which columns they have, how they become tokens, and how scored rows are read."""
