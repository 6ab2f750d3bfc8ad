"""The pipeline schedules: one file per method, each a pure function of sizes. `catalog` names them all."""
