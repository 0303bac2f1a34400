"""What the workflow knows of pack plans. Imports nothing heavy."""

# Bumped when the same settings and data give another plan.
PLAN_FORMAT = 1
PLAN_ARRAYS = ("rows.npy", "slices.npy", "order.npy")
