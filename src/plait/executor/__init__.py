"""From schedule to tensors: run it, measure it, look into it."""
