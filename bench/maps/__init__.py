"""Fitted maps on real pairs of models, and the study behind them: ``python -m bench.maps``."""
