"""One file per model family: which features a window gives, how maps become a waveform, how queries become a condition."""
