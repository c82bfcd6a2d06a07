"""`python -m lfm_scan` is the command line."""

import sys

from lfm_scan.cli.main import main

sys.exit(main())
