"""The operators' namespace, named here and nowhere else: a build for the `kernels` library gives it a name of its own."""

import torch

NAMESPACE = "droidspeak_ops"
ops = getattr(torch.ops, NAMESPACE)
