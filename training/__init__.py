"""Trains the demo model from procedural sounds; not part of the installed package."""
