"""The bench of host time runs, here with each call made once."""

from bench.test_overhead import model, test_overhead, test_partial_prefill

__all__ = ["model", "test_overhead", "test_partial_prefill"]
