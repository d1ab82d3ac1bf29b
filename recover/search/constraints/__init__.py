"""What a perturbation may not do, as projections and measures. Read `linear` first.

============  ==============================================================================================
`linear`      C1 to C4 at one site: encoder-orthogonal, activation-stable, decode-stable, within the budget
`admissible`  the linear space over several sites: C1 and the rows of a Jacobian, to first order
`pinned`      deltas at every site whose corrections keep every clamped pre-activation, exactly
`monitor`     what clamped features of all sites do under a delta, and the Jacobian of that
`restored`    the search for a delta at the first site, with the features of all sites restored after each step
============  ==============================================================================================
"""
