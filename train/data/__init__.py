"""Data: nuScenes through its devkit, and a built-in drive that needs no files."""
