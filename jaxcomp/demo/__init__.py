"""The main job on real data: ``jaxcomp demo``."""
