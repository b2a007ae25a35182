"""Pure: which sequence computes what in the next step. No MLX, clock, randomness or I/O."""
