"""Measurements against peers and the paper's experiments. Never imported by the product."""
