"""The public classes: the trainer that fits influence, the scorer that applies it, and what they check."""
