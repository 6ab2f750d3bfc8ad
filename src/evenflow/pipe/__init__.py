"""The face: `pipeline` builds, `Pipeline` trains."""
