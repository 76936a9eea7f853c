"""Measurements and conformance checks; run as `python -m benchmarks.NAME`."""
