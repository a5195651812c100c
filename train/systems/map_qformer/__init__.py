"""Online map detection with a Q-Former and a frozen language model, as an experiment."""
