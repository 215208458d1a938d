"""Exchanges that move the KV rows a plan asks for, and their gradients on the way back."""
