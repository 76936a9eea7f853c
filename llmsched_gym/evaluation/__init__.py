"""Evaluation: run grids of policies, loads and seeds; figures, intervals and capacity from their rows."""
