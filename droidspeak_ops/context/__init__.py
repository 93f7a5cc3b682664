"""What a sender leaves of a context for receivers: its tensors, in full or in 8 bits, their file, and who made them."""
