"""Proof of the kernels without a GPU: their machine code, the traffic they cause, the time they cannot beat."""
