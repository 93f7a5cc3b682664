"""What :mod:`bench.fuzz` damages, how, and what reads it."""
