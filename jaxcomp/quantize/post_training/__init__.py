"""Quantization of a trained model: from its weights alone, or from batches of its inputs."""
