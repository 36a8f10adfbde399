"""How one operation is done: one operator a file, with its reference beside its kernels."""
