"""The benchmark stage and its peers. Installed as cloudrt.bench."""
