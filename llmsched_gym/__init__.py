"""llmsched-gym: a Gymnasium environment for LLM inference scheduling."""
