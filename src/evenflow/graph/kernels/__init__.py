"""What torch does below its functions: kernels, fake tensors, FLOPs, settings."""
