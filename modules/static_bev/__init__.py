"""Static bird's-eye view: lane markings, road areas and things on the ground, with temporal fusion."""
