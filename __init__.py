"""Query-conditioned target sound extraction: export checkpoints to ONNX bundles, prove them, run them without torch."""

__version__ = "0.1.0"
