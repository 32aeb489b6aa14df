"""A simulated CUDA: CUDA's own torch on a CUDA runtime and an NCCL that need no GPU. See README.md."""
