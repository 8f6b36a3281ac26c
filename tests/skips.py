"""Skipped tests by their reasons, and which reasons CI accepts: ``skips.txt``."""

import fnmatch
import os
from collections import Counter
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

KNOWN = Path(__file__).with_name("skips.txt")
Skip = Tuple[str, str]


def known() -> Dict[str, str]:
    """Patterns of reasons, each with why CI cannot do better."""
    found: Dict[str, str] = {}
    pattern = ""
    for line in KNOWN.read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith(" "):
            found[pattern] = (found[pattern] + " " + line.strip()).strip()
        else:
            pattern = line.strip()
            found[pattern] = ""
    unexplained = [pattern for pattern, why in found.items() if not why]
    if unexplained:
        raise ValueError("{} does not say why CI skips: {}".format(KNOWN.name, ", ".join(unexplained)))
    return found


def unknown(skipped: Sequence[Skip]) -> List[str]:
    """Where ``CI=1`` is set, the skips that stand for a failure: nobody wrote down why CI cannot run these tests."""
    if os.environ.get("CI") != "1":
        return []
    patterns = known()
    listed = lambda reason: any(fnmatch.fnmatchcase(reason, pattern) for pattern in patterns)
    return ["{}: skipped for a reason that is not in {}: {}".format(test, KNOWN.name, why) for test, why in skipped if not listed(why)]


def show(skipped: Sequence[Skip]) -> None:
    """Print each reason once, with how many tests it kept from running."""
    for reason, count in sorted(Counter(reason for _, reason in skipped).items()):
        print("skipped: {} x {}".format(count, reason))
