"""Examine any adapter, report its defects, and fix what is safe to fix."""
