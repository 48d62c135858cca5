"""One file per model family: sizes, checkpoint keys, PyTorch modules and the graphs that they become."""
