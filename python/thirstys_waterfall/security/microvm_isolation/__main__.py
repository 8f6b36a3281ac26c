"""``python -m thirstys_waterfall.security.microvm_isolation doctor``."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())
