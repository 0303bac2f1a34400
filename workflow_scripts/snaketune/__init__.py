"""SnakeTune's library: one subject to a room; docs/code.md has their order."""
