"""EVA as fused CUDA kernels in Triton, forward and backward, behind `evavit.ops.eva_attention`.

Memory traffic bounds EVA: at 49 keys a window and 49 cells the arithmetic takes a fraction of the bytes' time. In
units of one `(B, N, C)` tensor the kernels move

    forward    cells:   q, k, v in                                  -> k̃, β                             3
               windows: q, k, v in                                  -> y, log-sum-exp                   4
    backward   shared:  q, y, dy in                                 -> dk̃, dβ of the logits, y·dy       3
               weights: k, v in                                     -> ξ, d log ξ, dω                   2
               summary: the cells' tensors alone                    -> dq̄, dk̄, parameters              0
               tokens:  q, k, v, dy in                              -> dq, dk, dv, bias                 7

where 4 and 8 are the floors. The kernel that writes dq, dk and dv comes last, when everything that reaches a token
through its cell is known: so each gradient is written once and read never.

Every sum runs in one fixed order, in a program or over partial sums in memory: no atomics, two runs agree to the bit.
Products of half-precision tensors accumulate in float32, float32 tensors are multiplied in full float32.

On Hopper `eva_gluon.py` has faster kernels for three of these, for the default windows and cells (`_Plan.gluon`).
"""
