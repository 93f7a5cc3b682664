"""Everything that a GPU has to say about this project, in one run of a few minutes: ``python -m bench.gpu --out FOLDER``."""
