"""The features that work with each family: the outcomes of the tests, as the table in docs/models.md."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- The tests write this table: pytest --write-support-table -->\n", "<!-- end of the table -->\n"

# Columns by the name that a test is marked with.
FEATURES = {
    "recompute": "recompute all = own prefill",
    "reuse": "reuse = prefix caching",
    "mixed": "mixed plan = slow reference",
    "window": "sliding windows",
    "generate": "greedy tokens",
    "batch": "ragged batch",
    "lora": "LoRA, unmerged",
    "rope": "other RoPE parameters",
    "codes": "fp8 and int8 contexts",
    "half": "bf16 and fp16",
    "static": "compiled decode",
    "sdpa": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
}


class SupportTable:
    """Collects the outcomes of the tests that are marked with a feature and a family."""

    def __init__(self) -> None:
        self._outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)

    def add(self, feature: str, family: str, report: pytest.TestReport) -> None:
        if report.failed or report.when == "call" or report.skipped:
            self._outcomes[family, feature].add(report.outcome)

    def is_complete(self, families: list[str]) -> bool:
        """Return whether all that the table shows was run."""
        return all((family, feature) in self._outcomes for family in families for feature in FEATURES)

    def markdown(self, families: list[str]) -> str:
        def cell(family: str, feature: str) -> str:
            outcomes = self._outcomes[family, feature]
            return "**no**" if "failed" in outcomes else "yes" if "passed" in outcomes else "—"

        header = "| `model_type` | " + " | ".join(FEATURES.values()) + " |\n|---|" + "---|" * len(FEATURES) + "\n"
        rows = (f"| `{name}` | " + " | ".join(cell(name, each) for each in FEATURES) + " |\n" for name in families)
        return header + "".join(rows)


def documented() -> str:
    """The table in the page."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


def write(table: str) -> None:
    """Put a table in the place of the page's."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + table + END + after, encoding="utf-8")
