"""What is computed from frozen features alone."""
