"""Attention of the missing cameras' queries to listed blocks of keys, none of them gathered."""
