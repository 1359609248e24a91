"""Checkpoints as files: written so that no kill and no power loss can harm them, read so that nothing is trusted."""
