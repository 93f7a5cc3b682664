"""``droidspeak demo``."""

from __future__ import annotations

import argparse

from ..demo import run as whole


def run(options: argparse.Namespace) -> None:
    """Run the demo."""
    whole.run(options.sender, options.receiver, options.examples, options.plot, options.base)
