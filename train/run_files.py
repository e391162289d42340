"""Names of the files in a run folder; without PyTorch, because `cloudrt-train` checks them before it loads PyTorch."""

STATE = "state.pth"
"""The state of an interrupted run, which is in the folder until the run is finished."""
PROBABILITIES = "held_out.npz"
"""The held-out predictions of a fold, which the cross-validation merges."""
TENSORBOARD = "tensorboard"
"""Folder of the TensorBoard logs."""
RUN_STARTS = ("config.json", "held_out.txt")
"""Written when a run starts."""
RUN_RESULTS = ("best.pth", "last.pth", "history.csv", "curves.png", PROBABILITIES, STATE)
"""Results of a run. A later run in the same folder removes them."""
CROSS_RESULTS = ("folds.json", "oof.npz")
"""Results of a cross-validation, apart from the folders of its folds. A later run in the same folder removes them."""
