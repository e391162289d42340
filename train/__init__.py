"""The training stage: data set to best.pth. Installed as cloudrt.train."""
