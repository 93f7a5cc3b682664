"""Partial prefill for plain transformers models. The only package here that imports transformers."""
