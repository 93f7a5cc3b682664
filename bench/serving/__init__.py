"""Load on real servers of vLLM, without sharing of contexts and with it: ``python -m bench.serving``."""
