"""Measuring what batches take on a real model, and profiles fitted to it: `llmsched calibrate`."""
