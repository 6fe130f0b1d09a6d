"""Influence read in other ways: by layers, over test rows, between halves of a validation set."""
