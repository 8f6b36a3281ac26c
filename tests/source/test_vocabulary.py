"""The words that gave way to the field's: source, stubs and documents use them no more."""

import re
import unittest
from pathlib import Path
from typing import Iterator, List, Tuple

ROOT = Path(__file__).resolve().parent.parent.parent
# The former word, and what the field says. Words of ordinary English are not listed: only those that stood for a thing.
GAVE_WAY = (
    (r"[Rr]ecess(?:es)?", "re-handshake"),
    (r"lay_down|laid down|take_up", "suspend, resume a session"),
    (r"Asker|[Aa]skers?", "ReplyTo, caller"),
    (r"Exchanges?|MAX_EXCHANGES", "call"),
    (r"Hearer|[Hh]earers?|Heard|Happening", "Subscriber, Recv, EventKind"),
    (r"[Ii]ntroduction", "identity delivery"),
    (r"[Ss]tandbys?|VMs that stand by", "warm VM"),
    (r"Supply|Shelf|ShelfUse|KeptEntry|Kept|Making|Outline", "VmPool, SnapshotStore, Snapshot, PendingSnapshot"),
    (r"Treatments?|treatments?|treat_until_well", "remediation"),
    (r"Brief|Verdict|judge_\w+", "HealthRecord, HealthReport, evaluate"),
    (r"Door|Passage|Bell", "ForkGate, Notifier"),
    (r"Luggage|luggage|Carrier|Concealed|conceal|leash(?:_held)?", "PendingFd, FdStream, ForkGuard, lifeline"),
    (r"Wish|Chosen|Told", "BackendRequest, Selection, a report"),
    (r"Segment|[Ss]hapers?|beyond_[N\d{]|chain (?:arrival|passage)", "VM network, ifb, egress, prerouting, forward"),
    (r"[Rr]ehears\w*|REHEARS\w*", "warm-up, trial"),
    (r"put[_ ]away", "suspend"),
)


def sources() -> Iterator[Path]:
    yield from sorted((ROOT / "src").rglob("*.rs"))
    yield from sorted(path for path in (ROOT / "python").rglob("*") if path.suffix in (".py", ".pyi"))
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from (ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"))


class Vocabulary(unittest.TestCase):
    def test_words_that_gave_way_stand_nowhere(self) -> None:
        words = [(re.compile(r"(?<!\w)(?:{})(?!\w)".format(former)), now) for former, now in GAVE_WAY]
        found: List[Tuple[str, str, str]] = []
        for path in sources():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                place = "{}:{}".format(path.relative_to(ROOT), number)
                found += [(place, match.group(), now) for word, now in words for match in word.finditer(line)]
        self.assertEqual(found, [], "place, word, and what to say instead")
