"""One module for each command of `in2core`."""
