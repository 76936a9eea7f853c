"""Schedulers of this project inside vLLM: one mechanism that runs a given batch, and what decides on batches.

Importing this package needs no vLLM; :mod:`llmsched_gym.real_backend.vllm_plugin` does. See docs/vllm.md.
"""
