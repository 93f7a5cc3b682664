"""The command ``droidspeak demo``: the speed and quality of reuse on a real model and its fine-tune."""
