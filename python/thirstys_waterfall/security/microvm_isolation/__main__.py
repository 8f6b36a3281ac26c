"""``python -m thirstys_waterfall.security.microvm_isolation``: the command line ``microvm``."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m thirstys_waterfall.security.microvm_isolation"))
