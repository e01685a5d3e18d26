"""Turn predictions into gains, forgetting and a verdict."""
