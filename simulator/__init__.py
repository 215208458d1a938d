"""What a method would cost on a machine: one pack's forward and backward through an attention layer, rank by rank."""
