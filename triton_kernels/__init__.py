"""The one-pass step in Triton, installed as ``nesterov_pp.triton_kernels``."""
