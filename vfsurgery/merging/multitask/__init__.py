"""Experts for different tasks as one network: a trunk for all, and the head of each."""
