"""`python -m llmsched_gym.real_backend.calibration`."""

import sys

from llmsched_gym.real_backend.calibration.calibrate import main

sys.exit(main())
