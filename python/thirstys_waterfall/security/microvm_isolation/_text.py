"""Output of a program as text: UTF-8, however it was cut into pieces."""

import codecs
from typing import Dict, Iterator, Tuple

from . import _native

_make = codecs.getincrementaldecoder("utf-8")


class TextDecoder:
    """Decodes each channel on its own. What is not UTF-8 becomes U+FFFD; a character whose end has not come waits for it."""

    def __init__(self) -> None:
        self._decoders: Dict[str, codecs.IncrementalDecoder] = {}

    def decode(self, channel: str, data: bytes) -> str:
        return self._decoders.setdefault(channel, _make("replace")).decode(data)

    def end(self) -> Iterator[Tuple[str, str]]:
        """What is left of characters that never ended."""
        for channel, decoder in self._decoders.items():
            text = decoder.decode(b"", final=True)
            if text:
                yield channel, text


def texts(stream: "_native.ProcessStream", decoder: TextDecoder) -> Iterator[Tuple[str, str]]:
    for channel, data in stream:
        text = decoder.decode(channel, data)
        if text:
            yield channel, text
    yield from decoder.end()
