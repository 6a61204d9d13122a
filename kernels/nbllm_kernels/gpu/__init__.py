"""The Triton kernels, one file per op.

Imported only when a tensor on a CUDA device arrives (or by tests, through Triton's interpreter):
the package itself runs where there is no Triton. Launch sizes come from fixed tables: nothing is
tuned at run time, so a shape always runs the same code.
"""
