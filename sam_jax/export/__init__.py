"""Ways out to run elsewhere: ONNX and StableHLO."""
