"""Bounds on one element, and what they prove: overlap, membership, label."""
