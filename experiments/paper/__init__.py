"""The paper's figures from the simulator: its published numbers, the runs that stand beside them, pictures and page."""
