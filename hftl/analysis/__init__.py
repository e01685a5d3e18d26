"""Compute what frozen features tell: probes, drift, neighbours, and the preflight check."""
