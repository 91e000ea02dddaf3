"""The best network under a budget, and measured latency."""
