"""Export the published folder, check it, and push it."""
