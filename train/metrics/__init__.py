"""What results are judged by: the official and the published metrics."""
