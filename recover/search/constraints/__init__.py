"""What a perturbation may not do, as projections and measures. Read `linear` first.

============  ==============================================================================================
`linear`      C1 to C4 at one site: encoder-orthogonal, activation-stable, decode-stable, within the budget
`first_order` the linear space over several sites: C1 and the rows of a Jacobian, to first order
`pinned`      deltas at every site whose corrections keep every clamped pre-activation, exactly
`monitor`     what clamped features of all sites do under a delta, and the Jacobian of that
============  ==============================================================================================
"""
