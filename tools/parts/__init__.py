"""What the commands in tools/ are made of. No file here is a command."""
