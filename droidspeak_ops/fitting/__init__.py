"""Fitting maps to a pair of models."""
