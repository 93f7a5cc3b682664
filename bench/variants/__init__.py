"""The fine-tunes that maps and plans are measured on: their tasks and their training."""
