"""`python -m clipfh`, for where the command is not on the path."""

import sys

from clipfh.cli.main import main

sys.exit(main())
