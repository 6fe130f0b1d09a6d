"""The maths of one batch and one pass: per-example gradients, DataInf's closed form, what a pass keeps on disk."""
