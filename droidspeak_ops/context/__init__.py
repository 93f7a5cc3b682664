"""Contexts that a sender leaves for receivers: their tensors, in full or in 8 bits, their file, and who made them."""
