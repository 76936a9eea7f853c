"""Reference schedulers, one file per family; each module lists its own in ``SCHEDULERS``."""

if __name__ != "llmsched_gym.baselines":  # a module under two names would be two modules, with kernels of their own
    raise ImportError(f"{__name__} is llmsched_gym.baselines: import it by that name")
