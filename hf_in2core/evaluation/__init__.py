"""Judging arms: losses, intervals, the verdict between them, and tasks of lm-eval."""
