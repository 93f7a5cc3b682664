"""Profiling a pair of models: quality and cost of plans, and the plan that fits a need."""
