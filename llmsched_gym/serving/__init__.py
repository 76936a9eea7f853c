"""Real servers under the load of a workload or a trace: the client, what it saw as rows, checks against /metrics."""
