"""Instances and proposals, scored by the rules of COCO and LVIS."""
