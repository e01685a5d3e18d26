"""What a run does after its recipe is read, a step each, from the corpora to the push."""
