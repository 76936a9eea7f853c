"""`python -m llmsched_gym.real_backend.calibration`."""

from llmsched_gym.interrupts import leave
from llmsched_gym.real_backend.calibration.calibrate import main

leave(main())
