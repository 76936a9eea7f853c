"""Reference schedulers, one file per family; each module lists its own in ``SCHEDULERS``."""
