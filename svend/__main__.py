"""`python -m svend` is the `svend` command."""

import sys

from svend.cli import main

sys.exit(main())
