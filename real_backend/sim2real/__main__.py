"""`python -m llmsched_gym.real_backend.sim2real`."""

from llmsched_gym.interrupts import leave
from llmsched_gym.real_backend.sim2real.compare import main

leave(main())
