"""What the paper (arXiv 2508.01002) and its authors' code say: claims, experiment, published and reference figures."""

PAPER_POLICIES = ("sarathi", "sarathi-spf", "slai", "slai-spf-fixed", "slai-fcfs-fixed", "slai-priority", "vllm-v0")
"""The schedulers of its comparison."""
LOADS = tuple(round(0.2 * k, 1) for k in range(1, 11))
"""Its arrival rates, requests/s."""
NUM_REQUESTS = 16_384
"""Of each of its runs."""

PAPER_TTFT_REDUCTION = 0.53
"""Of the median, by SLAI against Sarathi-Serve."""
PAPER_CAPACITY_GAIN = 0.26
"""Of the largest rate with a median TTFT below 0.5 s."""
PAPER_MEDIAN_TTFT_S = 0.5
"""The median TTFT that the paper's capacities are for."""

# What the authors' own scheduler classes give on a virtual clock (1,500 requests, 2 seeds).
REFERENCE_TTFT_REDUCTION = {1.0: 0.18, 1.36: 0.35, 1.6: 0.44, 1.73: 0.53, 1.8: 0.64}
REFERENCE_CAPACITY_QPS = {
    "sarathi": 1.36,
    "sarathi-spf": 1.50,
    "slai-fcfs-fixed": 1.48,
    "slai-spf-fixed": 1.56,
    "slai": 1.68,
    "slai-priority": 1.68,
    "vllm-v0": 1.60,
}

# chunk, TTFT ms, mean batch ms: Mistral-7B on one RTX 6000 Ada, the SLAI authors' scripts/plot1_results.csv.
PUBLISHED_SWEEP = (
    (64, 724.32, 22.717),
    (128, 386.263, 24.07),
    (256, 238.84, 28.817),
    (384, 243.887, 37.796),
    (512, 212.161, 46.512),
    (768, 204.894, 57.083),
    (1024, 201.519, 74.693),
)
