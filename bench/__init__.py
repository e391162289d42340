"""The measuring stage, with every peer that is timed. Installed as cloudrt.bench."""
