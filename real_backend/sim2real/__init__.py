"""The same runs on a real model and in the simulator, and how far they differ: `llmsched sim2real`."""
