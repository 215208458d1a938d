"""What carries one-sided puts: memory that every rank of the group can write to, and who does the writing."""
