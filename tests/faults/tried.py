"""What the tests of this folder tried: a line of JSON each in the file that TAKD_TRIED names, and the table of them.

TAKD_TRIED=tried.jsonl python3 -m pytest tests/faults && python3 tests/faults/tried.py tried.jsonl
"""

import collections
import json
import os
import sys
from pathlib import Path


def note(subject, fault, outcome):
    """One fault was inflicted, and the test found its outcome right."""
    if file := os.environ.get("TAKD_TRIED"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps([subject, fault, outcome]) + "\n")


def table(file):
    """Markdown: how often each fault was tried on each subject, and what came of it."""
    counts = collections.defaultdict(collections.Counter)
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        subject, fault, outcome = json.loads(line)
        counts[subject, fault][outcome] += 1
    rows = ["| what | fault | times | outcome |", "|---|---|---:|---|"]
    for (subject, fault), outcomes in sorted(counts.items()):
        one = len(outcomes) == 1
        came = "; ".join(what if one else f"{count} {what}" for what, count in outcomes.most_common())
        rows.append(f"| {subject} | {fault} | {sum(outcomes.values())} | {came} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(sys.argv[1]))
