"""Our own forward pass of the architectures people use, over weights that transformers loaded."""
