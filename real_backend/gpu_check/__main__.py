"""`python -m llmsched_gym.real_backend.gpu_check`."""

from llmsched_gym.interrupts import leave
from llmsched_gym.real_backend.gpu_check.check import main

leave(main())
