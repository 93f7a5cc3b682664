"""Profiling of a pair of models: quality and cost of plans, and the choice of one."""
