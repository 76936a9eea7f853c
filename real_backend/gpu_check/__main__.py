"""`python -m llmsched_gym.real_backend.gpu_check`."""

import sys

from llmsched_gym.real_backend.gpu_check.check import main

sys.exit(main())
