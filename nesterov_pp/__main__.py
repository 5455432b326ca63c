"""The entry point of ``python -m nesterov_pp``."""

from __future__ import annotations

import sys

from nesterov_pp.cli import main

sys.exit(main())
