"""Accuracy, cost and consistency of any number of networks."""
