"""The steps of ``python -m bench.gpu``, each in a process of its own."""
