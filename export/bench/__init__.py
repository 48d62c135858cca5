"""What separation costs on this machine: `clapsep-export bench`. docs/bench.md says how to read it. Needs no torch and no onnx."""

# Groups of cases, in the order in which they are measured.
GROUPS = ("stages", "graphs", "queries", "routes", "long", "several", "batches", "threads", "callers", "starts")
