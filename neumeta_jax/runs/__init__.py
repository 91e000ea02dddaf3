"""Configs, work directories, and the training that lives in them."""
