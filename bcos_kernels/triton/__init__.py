"""The Triton backend: fused kernels for NVIDIA GPUs from Ampere (sm_80) on. ``backend.py`` is what ``dispatch`` loads.

``TRITON_INTERPRET=1`` in the environment before the first call runs the same kernels on CPU tensors, slowly, for tests.
"""
