"""``python -m torchao_mx.demo``."""

import sys

from torchao_mx.demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
