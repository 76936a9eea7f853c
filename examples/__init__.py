"""Short programs to start from; run as `python -m examples.NAME`."""
