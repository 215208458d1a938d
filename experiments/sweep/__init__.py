"""Runs under several methods, side by side: what runs, what is kept of it, table, figure and page."""
