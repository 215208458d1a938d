"""The command `flashcp`: one module a verb, and how its words become settings."""
