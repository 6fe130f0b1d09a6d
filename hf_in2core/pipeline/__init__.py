"""A run of `in2core run` and its stages: settings, inputs, reference, influence, targets, comparison."""
