"""The export of what was trained: exported, verified, measured and scored files, and which of them ships."""
