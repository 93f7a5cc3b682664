"""The main job on a real model, as a command: how fast and how good a receiver is over a sender's KV cache."""
