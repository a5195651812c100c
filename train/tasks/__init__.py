"""What can be trained: for each task its settings, network, data and evaluation."""
