"""The portable GPU kernels, in Triton: one file per format, and what they share in ``common``.

They know tensors alone, as ``Pattern.gpu_tensors()`` and ``Pattern.sizes()`` give them.
Each file has, for a 2-D x of either layout and y in the same,

    ``linear(x, values, bias, pattern, sizes, *, activation=0)``     y  = σ(x Wᵀ + b)
    ``linear_backward_input(grad, values, pattern, sizes)``          dx = g W
    ``linear_backward_weight(grad, x, pattern, sizes)``              dW = gᵀ x, where W has values

in float32, bfloat16 or float16, with sums in float32 and without atomics: the same input gives the same bits.
The folder is installed as ``sparsekern.triton_kernels``, which links here. Importing it needs Triton.
"""
