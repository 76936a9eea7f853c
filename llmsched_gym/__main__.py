"""``python -m llmsched_gym`` is ``llmsched``."""

import sys

from llmsched_gym.cli import main

sys.exit(main())
