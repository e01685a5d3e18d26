"""What is wrong with an adapter, whoever made it, and what can be mended."""
