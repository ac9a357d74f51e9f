"""Run the command by `python -m clipfh`, where `clipfh` is not on the PATH."""

import sys

from clipfh.cli.main import main

sys.exit(main())
