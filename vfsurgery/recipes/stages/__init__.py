"""Recipes as lists of stages: sources go through them one after another, and every step can be resumed."""
