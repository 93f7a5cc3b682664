"""The paper's comparisons on real pairs of models: ``python -m bench.paper.paper``."""
