"""The operations of one mixture-of-experts layer, and the packed operations around it.

Tensor locals and arguments carry their shape as a suffix, in these letters throughout the project:

    B  texts in a batch             D  model width             E  experts
    L  padded length                N  attention heads         K  experts per token
    T  real tokens of a batch       H  head width              R  routed rows, T * K
    V  vocabulary                   F  feed-forward width      I  input width of a product
                                                               O  output width of a product

`nomoe_kernels.reference` is the definition of correct, in plain PyTorch, on any device;
`nomoe_kernels.fused` has the same operations as Triton kernels, `nomoe_kernels.invariant` so that a
token's bits do not depend on its batch. In kernels M, N and K are also the
sides of a tile, as BLOCK_M, BLOCK_N and BLOCK_K: rows, columns, and the width summed over.
"""
