"""A machine measured: what attention, copies and links cost on it, and the parameters that say so."""
