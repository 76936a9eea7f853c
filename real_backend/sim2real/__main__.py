"""`python -m llmsched_gym.real_backend.sim2real`."""

import sys

from llmsched_gym.real_backend.sim2real.compare import main

sys.exit(main())
