"""``python -m llmsched_gym.cli`` is ``llmsched``."""

import sys

from llmsched_gym.cli import main

sys.exit(main())
