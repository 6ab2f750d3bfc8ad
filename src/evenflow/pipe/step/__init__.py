"""One step or evaluation of a batch: agreed on, run, its outcome told to all ranks."""
