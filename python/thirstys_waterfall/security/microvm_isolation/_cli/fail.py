"""What went wrong, in one sentence with the remedy, on stderr."""

import contextlib
import sys
from typing import Union

from .. import MicroVMError


def complain(what: Union[MicroVMError, str]) -> None:
    """Prints a failure; a stderr that is closed or broken is no other failure."""
    text = str(what)
    remedy = what.details.get("remedy") if isinstance(what, MicroVMError) else None
    if remedy and remedy not in text:
        text = "{}; {}".format(text, remedy)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write("microvm: {}\n".format(text))
        sys.stderr.flush()
