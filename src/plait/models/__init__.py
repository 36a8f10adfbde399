"""Architectures: how the blocks of `nn/` make a model, and how it is called elsewhere."""
