"""Static bird's-eye view as an experiment: labels from maps, two steps of training, series evaluation."""
