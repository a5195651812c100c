"""Attention of each query to the tokens in windows round its reference points, and to no others."""
