"""The shell's face of Evenflow: `evenflow train`, `check`, `schedule`, and what its commands share.

`main` holds the commands; `config` says what a run is and reads it from TOML; `source` finds the model,
`feed` its batches; `job` is the run as ranks are sent it, `train` starts them, `training` is what each does.
`schedule`, `play`, `export` and `show` need neither a model nor torch.
"""
