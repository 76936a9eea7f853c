"""Everything worth measuring on a GPU: `python -m llmsched_gym.real_backend.gpu_check`."""
