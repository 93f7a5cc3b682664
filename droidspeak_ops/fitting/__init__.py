"""Fitting of maps to a pair of models."""
