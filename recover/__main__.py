"""`python -m recover` is `recover`."""

import sys

from recover.cli import main

sys.exit(main())
