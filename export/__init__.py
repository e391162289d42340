"""The export stage: best.pth to an ONNX artifact that gives the same submission. Installed as cloudrt.export."""
