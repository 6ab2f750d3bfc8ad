"""How to train: degrees, cuts, schedule, microbatches, memory. Begin with `chain`, then `planner`."""
