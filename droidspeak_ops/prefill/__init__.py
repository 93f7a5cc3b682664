"""Partial prefill without a model library: plans, maps, what they ask of each layer, and how a KV cache is filled by it."""
