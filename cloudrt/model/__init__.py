"""The model: artifact, network, checkpoint, configuration, and parity of outputs."""
