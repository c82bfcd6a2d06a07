"""The model on a CUDA GPU: `backend.CudaBackend`, and the networks that it runs.

Nothing is imported here: `kernels` and `fused` need Triton, which comes with torch's CUDA builds and no others.
"""
