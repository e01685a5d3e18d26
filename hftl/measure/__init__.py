"""From predictions to gains, forgetting and the verdict."""
