"""`python -m counterflow` is the command `counterflow`."""

import sys

from counterflow.cli import main

sys.exit(main())
