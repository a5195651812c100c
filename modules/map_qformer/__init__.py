"""Online map detection with a Q-Former, a frozen language model and map queries."""
