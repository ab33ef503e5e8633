"""What a run will need and cost, computed from its settings before anything is started."""
