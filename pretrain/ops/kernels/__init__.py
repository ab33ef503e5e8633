"""Triton kernels of the recurrences that nothing but time can unroll.

They are imported only where they are used, so that triton is needed only there. With
``TRITON_INTERPRET=1`` they run on a CPU, slowly: that is how the tests see them without a GPU, in
float64 too. Nothing is summed by atomics: the same input gives the same bits.
"""
