"""The shell's face of Evenflow: `evenflow train`, `check`, `schedule`, and what its commands share.

`main` holds the commands; `config` says what a run is and reads it from TOML; `source` finds the model;
`text` makes batches of text; `training` is what each rank does; `check` compares one step split with one step
whole; `report` is what the user sees.
`schedule`, with its flags and its report, needs neither a model nor torch.
"""
