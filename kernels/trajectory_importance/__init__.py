"""How near each image cell lies to a projected trajectory."""
