"""The artifact, the network and its checkpoint, its configuration, and parity between two models."""
