"""Benches of droidspeak_ops, each a command: ``python -m bench.NAME``, from the repository's root."""
