"""What a training leaves on disk, written and read."""
