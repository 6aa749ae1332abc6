"""What a run would take before it is made: memory, hours, and the figures of the GPUs it takes them on."""
