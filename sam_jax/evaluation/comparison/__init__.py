"""Results set side by side, with intervals: two checkpoints, and groups of masks."""
