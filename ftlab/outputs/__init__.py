"""What a run leaves behind: its folder, its files and its log, without a secret in them."""
