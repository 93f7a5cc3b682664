"""Files that :mod:`bench.fuzz` damages, the damages, and the readers."""
