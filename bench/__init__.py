"""The benchmark and the peers that it compares cloudrt with. Installed as cloudrt.bench."""
