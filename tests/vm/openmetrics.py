"""A strict reader of OpenMetrics text, written from the specification (OpenMetrics 1.0, "Text format").

It knows the types that the package uses, counter and gauge, and refuses whatever the specification does not allow for
them: it is a test, not a client.
"""

import math
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r"[a-zA-Z_][a-zA-Z0-9_]*"
NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?[iI][nN][fF](?:[iI][nN][iI][tT][yY])?|[nN][aA][nN]"
METADATA = re.compile(r"# (TYPE|HELP|UNIT) ({}) (.*)".format(NAME))
SAMPLE = re.compile(r"({})(?:\{{(.*)\}})? ({})(?: ({}))?".format(NAME, NUMBER, NUMBER))
ONE_LABEL = re.compile(r'({})="((?:[^"\\\n]|\\["\\n])*)"'.format(LABEL))
SUFFIXES = {"counter": ("_total", "_created"), "gauge": ("",)}


class Sample(NamedTuple):
    name: str
    labels: Dict[str, str]
    value: float


class Family:
    def __init__(self, name: str) -> None:
        self.name = name
        self.type: Optional[str] = None
        self.help: Optional[str] = None
        self.unit: Optional[str] = None
        self.samples: List[Sample] = []


def labels(text: Optional[str]) -> Dict[str, str]:
    out: Dict[str, str] = {}
    rest = text or ""
    while rest:
        match = ONE_LABEL.match(rest)
        if match is None:
            raise ValueError("malformed labels: {!r}".format(text))
        name, value = match.groups()
        if name in out or name.startswith("__"):
            raise ValueError("label {!r} twice or reserved: {!r}".format(name, text))
        out[name] = re.sub(r"\\(.)", lambda escape: "\n" if escape.group(1) == "n" else escape.group(1), value)
        rest = rest[match.end() :]
        if rest and not rest.startswith(","):
            raise ValueError("malformed labels: {!r}".format(text))
        # A comma at the end is not allowed.
        if rest == ",":
            raise ValueError("comma at the end: {!r}".format(text))
        rest = rest[1:]
    return out


def metadata(family: Family, kind: str, text: str) -> None:
    if family.samples:
        raise ValueError("{} of {} after its samples".format(kind, family.name))
    if getattr(family, kind.lower()) is not None:
        raise ValueError("{} of {} twice".format(kind, family.name))
    if kind == "TYPE" and text not in SUFFIXES:
        raise ValueError("type {!r} of {}".format(text, family.name))
    if kind == "UNIT" and text and not family.name.endswith("_" + text):
        raise ValueError("{} does not end with its unit {!r}".format(family.name, text))
    if kind == "HELP" and re.search(r"\\[^\\n\"]", text):
        raise ValueError("malformed help of {}: {!r}".format(family.name, text))
    setattr(family, kind.lower(), text)


def parse(text: str) -> Dict[str, Family]:
    """The families by name; ``ValueError`` says what is not OpenMetrics."""
    if not text.endswith("\n# EOF\n") or "\r" in text:
        raise ValueError("it must end with '# EOF' and a line feed, and have no carriage returns")
    families: Dict[str, Family] = {}
    current: Optional[Family] = None
    seen: Dict[Tuple[str, Tuple[Tuple[str, str], ...]], bool] = {}
    for line in text[: -len("# EOF\n")].splitlines():
        match = METADATA.fullmatch(line)
        if match is not None:
            kind, name, rest = match.groups()
            if current is None or current.name != name:
                if name in families:
                    raise ValueError("{} is interleaved with another family".format(name))
                current = families[name] = Family(name)
            metadata(current, kind, rest)
            continue
        sample = SAMPLE.fullmatch(line)
        if sample is None or current is None or current.type is None:
            raise ValueError("neither metadata nor a sample of a typed family: {!r}".format(line))
        name, inside, value = sample.group(1), sample.group(2), float(sample.group(3))
        if name not in [current.name + suffix for suffix in SUFFIXES[current.type]]:
            raise ValueError("{} is no sample of {}".format(name, current.name))
        if current.type == "counter" and (math.isnan(value) or value < 0):
            raise ValueError("a counter cannot be {}: {!r}".format(value, line))
        found = labels(inside)
        key = (name, tuple(sorted(found.items())))
        if key in seen:
            raise ValueError("twice: {!r}".format(line))
        seen[key] = True
        current.samples.append(Sample(name, found, value))
    # A family's samples must not be taken for another's.
    for family in families.values():
        for suffix in SUFFIXES[family.type or "gauge"]:
            if suffix and family.name + suffix in families:
                raise ValueError("{} clashes with {}".format(family.name + suffix, family.name))
    return families
