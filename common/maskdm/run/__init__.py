"""Folders that runs leave, safetensors, child processes, what is said on a terminal."""
